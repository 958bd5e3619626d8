//! TTFT of short prompts that arrive just behind a long one.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{
    Bench, Error, Served,
    client::{answer, follow},
    ms,
};
use crate::summary::quantile;

/// Short prompts behind each long one.
const SHORT: usize = 4;
/// Tokens of each.
const SHORT_TOKENS: usize = 32;
/// Steps that the long prompt takes when it is alone.
const STEPS: usize = 8;
/// The long prompt is being read by then.
const HEAD_START: Duration = Duration::from_millis(5);

#[derive(Default)]
struct Times {
    short: Vec<Duration>,
    long: Vec<Duration>,
}

/// One long prompt, and the short ones behind it.
async fn round(bench: &Bench, served: &Served, times: &mut Times) -> Result<(), Error> {
    let long = bench.fresh(served, bench.longest_prompt(served), 1);
    let client = served.client.clone();
    let long = tokio::spawn(async move { answer(&client, long).await });
    tokio::time::sleep(HEAD_START).await;
    let due = Instant::now();
    let short: Vec<_> = (0..SHORT)
        .map(|_| {
            let (client, ask) = (served.client.clone(), bench.fresh(served, SHORT_TOKENS, 1));
            tokio::spawn(async move { follow(&client, ask, due, |_| ()).await })
        })
        .collect();
    for task in short {
        times.short.push(task.await??.ttft);
    }
    times.long.push(long.await??.ttft);
    Ok(())
}

/// With the default threshold, half of a step, and with one as large as a step, which is none.
pub async fn run(bench: &Bench) -> Result<Value, Error> {
    let sized = bench.serve(&[]).await?;
    let long = bench.longest_prompt(&sized);
    let budget = (long / STEPS).max(sized.model.max_num_seqs as usize).to_string();
    drop(sized);
    let step = ["--max-num-batched-tokens", &budget];
    let off = [step[0], step[1], "--long-prefill-token-threshold", &budget];
    let servers = [("half of a step", bench.serve(&step).await?), ("off", bench.serve(&off).await?)];
    let mut times = [Times::default(), Times::default()];
    for _ in 0..3 * bench.size.rounds {
        for ((_, served), times) in servers.iter().zip(&mut times) {
            round(bench, served, times).await?;
        }
    }
    println!(
        "short prompts: {SHORT} of {SHORT_TOKENS} tokens just behind one of {long}; steps of {budget} tokens"
    );
    println!("  threshold        short TTFT p50   max ms   long TTFT ms");
    let mut rows = Vec::new();
    for ((name, _), times) in servers.iter().zip(&times) {
        let [p50, max] = [0.5, 1.0].map(|q| ms(quantile(&times.short, q)));
        let long = ms(quantile(&times.long, 0.5));
        println!("  {name:16} {p50:14.1} {max:8.1} {long:14.1}");
        rows.push(json!({
            "threshold": name, "short_ttft_p50_ms": p50, "short_ttft_max_ms": max, "long_ttft_p50_ms": long,
        }));
    }
    Ok(json!({ "long_prompt_tokens": long, "max_num_batched_tokens": budget, "thresholds": rows }))
}
