//! ITL of streams that decode while a long prompt arrives again and again, and the TTFT of that prompt.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{
    Bench, Error, Served,
    client::answer,
    crowd::{Crowd, Kind},
    ms,
};
use crate::summary::quantile;

/// Streams that decode.
const STREAMS: usize = 4;
/// The target is this multiple of the streams' ITL when nothing else runs.
const TARGET: u32 = 4;
/// Between the first token of one long prompt and the arrival of the next.
const PAUSE: Duration = Duration::from_millis(100);

/// The tokens of the step that gave the prompt's first one are there after it.
const LAST_STEP: Duration = Duration::from_millis(2);

/// A way to read long prompts, and what came of it.
struct Way {
    name: String,
    served: Served,
    gaps: Vec<Duration>,
    ttfts: Vec<Duration>,
}

impl Way {
    fn new(name: impl Into<String>, served: Served) -> Self {
        Self { name: name.into(), served, gaps: Vec::new(), ttfts: Vec::new() }
    }

    fn report(&self, quiet: Duration) -> Value {
        let [p50, p99, max] = [0.5, 0.99, 1.0].map(|q| ms(quantile(&self.gaps, q)));
        let ttft = ms(quantile(&self.ttfts, 0.5));
        let of_quiet = p99 / ms(quiet);
        println!("  {:28} {p50:7.2} {p99:8.2} {max:8.2} {of_quiet:11.1} {ttft:14.1}", self.name);
        json!({
            "way": self.name, "itl_p50_ms": p50, "itl_p99_ms": p99, "itl_max_ms": max,
            "p99_of_quiet_p99": of_quiet, "long_ttft_p50_ms": ttft, "num_long_prompts": self.ttfts.len(),
        })
    }
}

fn streams(served: &Served) -> Kind {
    let max_tokens = served.model.max_model_len.min(512) - 64;
    Kind { size: STREAMS, prompt_tokens: 32, max_tokens, priority: 0, tenant: "" }
}

/// What the streams' gaps are when nothing else runs.
async fn quiet(bench: &Bench, served: &Served) -> Result<Vec<Duration>, Error> {
    let crowd = Crowd::start(bench, served, streams(served), STREAMS).await?;
    crowd.take()?;
    tokio::time::sleep(bench.size.window / 2).await;
    Ok(crowd.take()?.gaps)
}

/// One round of one way.
async fn round(bench: &Bench, way: &mut Way) -> Result<(), Error> {
    let crowd = Crowd::start(bench, &way.served, streams(&way.served), STREAMS).await?;
    let (end, long) = (bench.window_end(), bench.longest_prompt(&way.served));
    while Instant::now() < end {
        // Only the time in which the prompt is read counts, with the gap in which it arrives and the one in which it is done.
        crowd.take()?;
        let seen = answer(&way.served.client, bench.fresh(&way.served, long, 1)).await?;
        way.ttfts.push(seen.ttft);
        tokio::time::sleep(LAST_STEP).await;
        way.gaps.extend(crowd.take()?.gaps);
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// Whole prompts in one step, chunks, and chunks that keep a target.
pub async fn run(bench: &Bench) -> Result<Value, Error> {
    let chunked = bench.serve(&[]).await?;
    let long = bench.longest_prompt(&chunked);
    let at_rest = quiet(bench, &chunked).await?;
    let (p50, p99) = (quantile(&at_rest, 0.5), quantile(&at_rest, 0.99));
    let target = p50 * TARGET;
    let target_ms = format!("{:.3}", ms(target));
    // With room for the streams beside the prompt.
    let whole = (long + 64).to_string();
    let budget = chunked.model.max_num_batched_tokens;
    let mut ways = [
        Way::new(
            format!("at once ({whole} per step)"),
            bench.serve(&["--max-num-batched-tokens", &whole]).await?,
        ),
        Way::new(format!("in chunks of {budget}"), chunked),
        Way::new(
            format!("target ITL {:.1} ms", ms(target)),
            bench.serve(&["--target-itl-ms", &target_ms]).await?,
        ),
    ];
    for _ in 0..bench.size.rounds {
        for way in &mut ways {
            round(bench, way).await?;
        }
    }
    println!("long prompt: {STREAMS} streams decode; their ITL while a prompt of {long} tokens is read");
    println!("  way                          ITL p50      p99   max ms  p99/quiet's   long TTFT ms");
    println!("  {:28} {:7.2} {:8.2}", "no long prompt", ms(p50), ms(p99));
    let rows: Vec<Value> = ways.iter().map(|way| way.report(p99)).collect();
    Ok(json!({
        "streams": STREAMS, "long_prompt_tokens": long, "target_itl_ms": ms(target),
        "quiet_itl_p50_ms": ms(p50), "quiet_itl_p99_ms": ms(p99), "ways": rows,
    }))
}
