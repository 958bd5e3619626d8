//! TTFT of an urgent request on a full server.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{
    Bench, Error,
    client::{Ask, answer},
    crowd::{Crowd, Kind},
    ms,
};
use crate::summary::quantile;

/// Rows of the batch.
const ROWS: &str = "4";
/// Requests of the crowd under way.
const CROWD: usize = 16;
/// Between an urgent request's end and the next.
const PAUSE: Duration = Duration::from_millis(50);

/// By priority and first come first served.
pub async fn run(bench: &Bench) -> Result<Value, Error> {
    // Other policies take no priority but 0.
    let rows = ["--max-num-seqs", ROWS];
    let by_priority = bench.serve(&[&rows[..], &["--scheduling-policy", "priority"]].concat()).await?;
    let policies = [("priority", by_priority, 10), ("fcfs", bench.serve(&rows).await?, 0)];
    let mut ttfts = [Vec::new(), Vec::new()];
    for _ in 0..bench.size.rounds {
        for ((_, served, priority), ttfts) in policies.iter().zip(&mut ttfts) {
            let kind =
                Kind { size: CROWD, prompt_tokens: 64, max_tokens: 64, priority: *priority, tenant: "" };
            let crowd = Crowd::start(bench, served, kind, CROWD / 2).await?;
            let end = bench.window_end();
            while Instant::now() < end {
                let urgent = Ask { priority: 0, ..bench.fresh(served, 64, 4) };
                ttfts.push(answer(&served.client, urgent).await?.ttft);
                tokio::time::sleep(PAUSE).await;
            }
            crowd.take()?;
        }
    }
    println!("urgent: a request of 64 tokens on a full server, {ROWS} rows and {CROWD} others under way");
    println!("  policy      TTFT p50      p99 ms   requests");
    let mut rows = Vec::new();
    for ((name, ..), ttfts) in policies.iter().zip(&ttfts) {
        let [p50, p99] = [0.5, 0.99].map(|q| ms(quantile(ttfts, q)));
        println!("  {name:10} {p50:9.1} {p99:11.1} {:10}", ttfts.len());
        rows.push(json!({
            "policy": name, "urgent_ttft_p50_ms": p50, "urgent_ttft_p99_ms": p99, "num_urgent": ttfts.len(),
        }));
    }
    Ok(json!(rows))
}
