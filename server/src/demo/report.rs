//! What the demonstration found: a table, the abort's receipt, and whether all was as it should be.

use std::time::Duration;

use tidemill_proto::v1::{AbortStage, FinishReason, Stats};
use tonic::Status;

use super::{
    prompts::Prompt,
    streams::{Abort, Timing},
};
use crate::terminal::Style;

/// Everything that was measured.
#[derive(Debug)]
pub struct Findings<'a> {
    /// The streams.
    pub prompts: &'a [Prompt],
    /// How each ended.
    pub outcomes: &'a [Option<Result<Timing, Status>>],
    /// The abort.
    pub abort: &'a Option<Result<Abort, Status>>,
    /// When all was over.
    pub last: &'a Stats,
    /// From the first request to the last stream's end.
    pub wall: Duration,
}

impl Findings<'_> {
    /// A line per stream, and one for all.
    pub fn table(&self, style: Style) -> String {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let mut table = style.bold("  stream     first token   between tokens   tokens   tokens/s   end");
        table.push('\n');
        let mut all = 0;
        for (index, (prompt, outcome)) in self.prompts.iter().zip(self.outcomes).enumerate() {
            let label = style.hue(index, &format!("{:<9}", prompt.label));
            let row = match outcome {
                Some(Ok(timing)) => {
                    all += timing.tokens;
                    format!(
                        "{:8.1} ms {:13.2} ms {:8} {:10.0}   {}",
                        ms(timing.first_token),
                        ms(timing.inter_token()),
                        timing.tokens,
                        timing.rate(),
                        ending(timing.finish)
                    )
                }
                Some(Err(status)) => format!("failed: {}", status.message()),
                None => "never ended".into(),
            };
            table.push_str(&format!("  {label} {row}\n"));
        }
        let seconds = self.wall.as_secs_f64();
        let total =
            format!("  together {all} tokens in {seconds:.2} s: {:.0} tokens/s", all as f64 / seconds);
        table + &style.bold(&total)
    }

    /// Everything that is not as it should be.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (prompt, outcome) in self.prompts.iter().zip(self.outcomes) {
            match outcome {
                Some(Ok(timing)) if timing.tokens > 0 && ended_well(prompt, timing.finish) => {}
                other => problems.push(format!("stream {:?} ended as {other:?}", prompt.label)),
            }
        }
        match self.abort {
            Some(Ok(abort))
                if abort.receipt.stage() == AbortStage::Decode && abort.receipt.blocks_freed > 0 => {}
            other => problems.push(format!("the abort gave {other:?}")),
        }
        let stats = self.last;
        if stats.kv_blocks_owned > 0 || stats.kv_blocks_free + stats.kv_blocks_cached != stats.kv_blocks_total
        {
            problems.push(format!("not all KV blocks came back: {stats:?}"));
        }
        if stats.num_requests_running + stats.num_requests_waiting > 0 || stats.requests_failed_total > 0 {
            problems.push(format!("requests are left, or failed: {stats:?}"));
        }
        problems
    }
}

fn ended_well(prompt: &Prompt, finish: FinishReason) -> bool {
    if prompt.endless { finish == FinishReason::Abort } else { finish == FinishReason::Stop }
}

/// How a stream ended, in a word.
pub fn ending(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort => "aborted",
        FinishReason::Unspecified => "unfinished",
    }
}

/// The receipt of an abort, and the blocks around it, in two lines.
pub fn receipt(abort: &Abort) -> [String; 2] {
    let receipt = &abort.receipt;
    let stage = receipt.stage().as_str_name().trim_start_matches("ABORT_STAGE_").to_lowercase();
    let tokens = receipt.completion_tokens;
    [
        format!("Control.Abort({:?}) took effect in {stage}, after {tokens} tokens:", receipt.request_id),
        format!(
            "{} KV blocks and {} row free in {:.0} µs; blocks in use {} → {} of {}",
            receipt.blocks_freed,
            receipt.rows_freed,
            receipt.seconds_to_free * 1e6,
            abort.before.kv_blocks_owned,
            abort.after.kv_blocks_owned,
            abort.before.kv_blocks_total,
        ),
    ]
}
