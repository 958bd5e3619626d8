//! TTFT of a prompt that is in the prefix cache against one that is not, by length.

use serde_json::{Value, json};

use super::{Bench, Error, client::answer, ms};
use crate::summary::median;

/// Shortest prompt.
const SHORTEST: usize = 64;

/// Each prompt is sent twice; the second finds all but its last block.
pub async fn run(bench: &Bench) -> Result<Value, Error> {
    let served = bench.serve(&[]).await?;
    println!("warm prefix: TTFT of a prompt, and of the same prompt again");
    println!("  prompt tokens   found again   cold ms   warm ms   cold/warm");
    let block = served.model.block_size as usize;
    let longest = bench.longest_prompt(&served);
    let lengths =
        std::iter::successors(Some(SHORTEST), |len| Some(len * 2)).take_while(|&len| len <= longest);
    let mut rows = Vec::new();
    for len in lengths {
        let (mut cold, mut warm) = (Vec::new(), Vec::new());
        let expected = (len - 1) / block * block;
        for _ in 0..bench.size.rounds {
            let ask = bench.fresh(&served, len, 1);
            let first = answer(&served.client, ask.clone()).await?;
            let second = answer(&served.client, ask).await?;
            if (first.cached_tokens, second.cached_tokens) != (0, expected) {
                let found = (first.cached_tokens, second.cached_tokens);
                return Err(format!("of {len} tokens {found:?} were found instead of (0, {expected})").into());
            }
            cold.push(ms(first.ttft));
            warm.push(ms(second.ttft));
        }
        let ratios: Vec<f64> = cold.iter().zip(&warm).map(|(cold, warm)| cold / warm).collect();
        let (cold, warm, ratio) = (median(&cold), median(&warm), median(&ratios));
        println!("  {len:13} {expected:13} {cold:9.1} {warm:9.1} {ratio:11.1}");
        rows.push(json!({
            "prompt_tokens": len, "cached_tokens": expected,
            "cold_ttft_ms": cold, "warm_ttft_ms": warm, "ratio": ratio,
        }));
    }
    Ok(json!(rows))
}
