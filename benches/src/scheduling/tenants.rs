//! Shares of two tenants, one of which floods.

use std::time::Duration;

use serde_json::{Value, json};

use super::{
    Bench, Error, Served,
    crowd::{Crowd, Kind},
    ms,
};
use crate::summary::quantile;

/// Rows of the batch.
const ROWS: &str = "4";
/// Requests that the small tenant has under way.
const SMALL: usize = 4;
/// Requests that the flooding one has.
const FLOOD: usize = 10 * SMALL;

/// A policy, what the two ask for, and what they got.
struct Case {
    name: &'static str,
    served: Served,
    /// Requests under way: of `a`, of `b`.
    sizes: [usize; 2],
    /// What the policy promises `b`.
    promised: Option<f64>,
    tokens: [usize; 2],
    ttfts: [Vec<Duration>; 2],
}

async fn case(
    bench: &Bench,
    name: &'static str,
    options: &[&str],
    sizes: [usize; 2],
    promised: Option<f64>,
) -> Result<Case, Error> {
    let served = bench.serve(&[&["--max-num-seqs", ROWS], options].concat()).await?;
    Ok(Case { name, served, sizes, promised, tokens: [0; 2], ttfts: [Vec::new(), Vec::new()] })
}

impl Case {
    async fn round(&mut self, bench: &Bench) -> Result<(), Error> {
        let kind = |size, tenant| Kind { size, prompt_tokens: 32, max_tokens: 32, priority: 0, tenant };
        let [a, b] = self.sizes;
        // The flood first: the queue is long when the other comes.
        let a = Crowd::start(bench, &self.served, kind(a, "a"), 1).await?;
        let b = Crowd::start(bench, &self.served, kind(b, "b"), 0).await?;
        tokio::time::sleep(bench.size.window / 4).await;
        a.take()?;
        b.take()?;
        tokio::time::sleep(bench.size.window).await;
        for (at, crowd) in [a, b].into_iter().enumerate() {
            let log = crowd.take()?;
            self.tokens[at] += log.tokens;
            self.ttfts[at].extend(log.ttfts);
        }
        Ok(())
    }

    fn report(&self) -> Value {
        let share = self.tokens[1] as f64 / (self.tokens[0] + self.tokens[1]) as f64;
        let [a, b] = [0, 1].map(|at| ms(quantile(&self.ttfts[at], 0.5)));
        let promised = self.promised.map_or_else(|| "-".into(), |share| format!("{share:.2}"));
        let [num_a, num_b] = self.sizes;
        println!("  {:18} {num_a:3} {num_b:3} {share:11.3} {promised:>9} {a:13.1} {b:11.1}", self.name);
        json!({
            "policy": self.name, "requests_under_way": self.sizes, "tokens": self.tokens, "share_of_b": share,
            "promised_share_of_b": self.promised, "ttft_p50_ms": [a, b],
        })
    }
}

/// First come first served and fair with one tenant flooding, and fair by weights with both flooding.
pub async fn run(bench: &Bench) -> Result<Value, Error> {
    let weighted = ["--scheduling-policy", "fair", "--tenant-weight", "a=1", "--tenant-weight", "b=3"];
    let mut cases = [
        case(bench, "fcfs", &[], [FLOOD, SMALL], None).await?,
        case(bench, "fair", &weighted[..2], [FLOOD, SMALL], Some(0.5)).await?,
        case(bench, "fair, weights 1:3", &weighted, [FLOOD / 2, FLOOD / 2], Some(0.75)).await?,
    ];
    for _ in 0..bench.size.rounds {
        for case in &mut cases {
            case.round(bench).await?;
        }
    }
    println!("tenants: a floods, b does not (and then both do); {ROWS} rows");
    println!("  policy               a   b  share of b  promised  TTFT p50 of a   of b (ms)");
    Ok(cases.iter().map(Case::report).collect())
}
