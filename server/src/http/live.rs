//! `/live`: the engine at work, as one JSON object per reading. Names are those of `tidemill.v1`.

use std::{future::ready, time::Duration};

use axum::response::Response;
use futures_util::{StreamExt, stream};
use serde::Serialize;
use tidemill_engine::{
    EngineStats, Histogram,
    activity::{AbortCause, ActiveRow, Activity, BlockMap, PastAbort, Waiter},
    scheduler::Stage,
};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::{ApiError, App, Call, engine_routes::stage_name, page, sse};
use crate::{client::CallError, grpc::Phase};

/// Time between two readings.
const INTERVAL: Duration = Duration::from_millis(200);

/// Streams readings until the client goes or the engine stops. As with `Control.Explain`, whoever has a key sees the ids of everybody's
/// requests, but no text and no tokens.
pub async fn watch(app: App, _: &mut Call) -> Result<Response, ApiError> {
    if !app.live_page {
        return Err(page::disabled());
    }
    // Without an engine there is a status to say so.
    let first = reading(&app).await?;
    let mut ticks = interval_at(Instant::now() + INTERVAL, INTERVAL);
    // A reader that was slow gets the present, not the past.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let rest = stream::unfold((app, ticks), |(app, mut ticks)| async {
        ticks.tick().await;
        if app.engine.phase() == Phase::Stopped {
            return None;
        }
        // The engine is gone: so is the stream, and the next one gets a status.
        let event = reading(&app).await.ok()?;
        Some((event, (app, ticks)))
    });
    Ok(sse::response(stream::once(ready(first)).chain(rest)))
}

async fn reading(app: &App) -> Result<Vec<u8>, CallError> {
    let (activity, stats) = (app.engine.activity().await?, app.engine.stats().await?);
    let mut event = Vec::new();
    sse::data(&mut event, &LiveEvent::new(&activity, &stats));
    Ok(event)
}

/// One reading.
#[derive(Debug, Serialize)]
struct LiveEvent {
    activity: LiveActivity,
    stats: LiveStats,
}

impl LiveEvent {
    fn new(activity: &Activity, stats: &EngineStats) -> Self {
        Self { activity: LiveActivity::new(activity), stats: LiveStats::new(stats) }
    }
}

/// Batch, queue, blocks and the last aborts.
#[derive(Debug, Serialize)]
struct LiveActivity {
    steps_total: u64,
    uptime_seconds: f64,
    max_num_seqs: usize,
    rows: Vec<LiveRow>,
    rows_left_out: usize,
    num_waiting: usize,
    waiting: Vec<LiveWaiter>,
    blocks: LiveBlocks,
    aborts: Vec<LiveAbort>,
}

#[derive(Debug, Serialize)]
struct LiveRow {
    request_id: String,
    index: u32,
    stage: &'static str,
    prompt_tokens: usize,
    computed_tokens: usize,
    completion_tokens: usize,
    kv_blocks: usize,
}

#[derive(Debug, Serialize)]
struct LiveWaiter {
    request_id: String,
    index: u32,
    prompt_tokens: usize,
    completion_tokens: usize,
    is_resumed: bool,
}

#[derive(Debug, Serialize)]
struct LiveBlocks {
    total: usize,
    blocks_per_cell: usize,
    /// A state of a cell and how many cells in a row have it. Neighbours are often alike: much shorter than all cells.
    runs: Vec<(u16, usize)>,
}

#[derive(Debug, Serialize)]
struct LiveAbort {
    number: u64,
    at_uptime_seconds: f64,
    cause: &'static str,
    request_id: String,
    stage: &'static str,
    completion_tokens: usize,
    blocks_freed: usize,
    rows_freed: usize,
    seconds_to_free: f64,
}

/// What the curves and the counters are made from.
#[derive(Debug, Serialize)]
struct LiveStats {
    num_requests_running: usize,
    num_requests_waiting: usize,
    num_requests_parked: usize,
    kv_blocks: LiveBlockCounts,
    prompt_tokens_total: u64,
    generation_tokens_total: u64,
    preemptions_total: u64,
    requests_finished_total: u64,
    requests_aborted_total: u64,
    uptime_seconds: f64,
    draining: bool,
    time_to_first_token_seconds: LiveHistogram,
    inter_token_latency_seconds: LiveHistogram,
}

#[derive(Debug, Serialize)]
struct LiveBlockCounts {
    total: usize,
    free: usize,
    owned: usize,
    cached: usize,
}

/// Each count is of its own range; there is one more than bounds.
#[derive(Debug, Serialize)]
struct LiveHistogram {
    bounds: Vec<f64>,
    counts: Vec<u64>,
}

impl LiveActivity {
    fn new(activity: &Activity) -> Self {
        Self {
            steps_total: activity.steps,
            uptime_seconds: activity.uptime.as_secs_f64(),
            max_num_seqs: activity.max_num_seqs,
            rows: activity.rows.iter().map(row).collect(),
            rows_left_out: activity.rows_left_out,
            num_waiting: activity.num_waiting,
            waiting: activity.waiting.iter().map(waiter).collect(),
            blocks: blocks(&activity.blocks),
            aborts: activity.aborts.iter().map(abort).collect(),
        }
    }
}

impl LiveStats {
    fn new(stats: &EngineStats) -> Self {
        let (blocks, counters) = (stats.kv_blocks, &stats.counters);
        Self {
            num_requests_running: stats.num_requests_running,
            num_requests_waiting: stats.num_requests_waiting,
            num_requests_parked: stats.num_requests_parked,
            kv_blocks: LiveBlockCounts {
                total: blocks.total,
                free: blocks.free,
                owned: blocks.owned,
                cached: blocks.cached,
            },
            prompt_tokens_total: counters.prompt_tokens,
            generation_tokens_total: counters.generation_tokens,
            preemptions_total: counters.preemptions,
            requests_finished_total: counters.finished,
            requests_aborted_total: counters.aborted,
            uptime_seconds: stats.uptime.as_secs_f64(),
            draining: stats.draining,
            time_to_first_token_seconds: histogram(&stats.histograms.time_to_first_token),
            inter_token_latency_seconds: histogram(&stats.histograms.inter_token_latency),
        }
    }
}

fn row(row: &ActiveRow) -> LiveRow {
    LiveRow {
        request_id: row.id.as_str().to_owned(),
        index: row.index,
        stage: match row.stage {
            Stage::Queued => "queued",
            Stage::Prefill => "prefill",
            Stage::Decode => "decode",
        },
        prompt_tokens: row.prompt_tokens,
        computed_tokens: row.computed_tokens,
        completion_tokens: row.completion_tokens,
        kv_blocks: row.kv_blocks,
    }
}

fn waiter(waiter: &Waiter) -> LiveWaiter {
    LiveWaiter {
        request_id: waiter.id.as_str().to_owned(),
        index: waiter.index,
        prompt_tokens: waiter.prompt_tokens,
        completion_tokens: waiter.completion_tokens,
        is_resumed: waiter.is_resumed,
    }
}

fn blocks(map: &BlockMap) -> LiveBlocks {
    let runs = map.cells.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect();
    LiveBlocks { total: map.total, blocks_per_cell: map.blocks_per_cell, runs }
}

fn abort(past: &PastAbort) -> LiveAbort {
    let receipt = &past.receipt;
    LiveAbort {
        number: past.number,
        at_uptime_seconds: past.at.as_secs_f64(),
        cause: match past.cause {
            AbortCause::Called => "called",
            AbortCause::Dropped => "dropped",
        },
        request_id: receipt.id.as_str().to_owned(),
        stage: stage_name(receipt.stage),
        completion_tokens: receipt.completion_tokens,
        blocks_freed: receipt.blocks_freed,
        rows_freed: receipt.rows_freed,
        seconds_to_free: receipt.time_to_free.as_secs_f64(),
    }
}

fn histogram(histogram: &Histogram) -> LiveHistogram {
    LiveHistogram { bounds: histogram.bounds.to_vec(), counts: histogram.counts.clone() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tidemill_engine::{
        ids::RequestId,
        kv::BlockCounts,
        output::{AbortReceipt, AbortStage},
    };

    use super::*;

    fn activity() -> Activity {
        let id = RequestId::new("a");
        let (prompt_tokens, completion_tokens) = (5, 2);
        let row = ActiveRow {
            id: id.clone(),
            index: 1,
            stage: Stage::Decode,
            prompt_tokens,
            computed_tokens: 6,
            completion_tokens,
            kv_blocks: 2,
        };
        let waiter =
            Waiter { id: id.clone(), index: 0, prompt_tokens, completion_tokens: 0, is_resumed: false };
        let receipt = AbortReceipt {
            id,
            stage: AbortStage::Prefill,
            completion_tokens: 0,
            blocks_freed: 3,
            rows_freed: 1,
            time_to_free: Duration::from_micros(40),
        };
        let past = PastAbort { number: 7, at: Duration::from_secs(2), cause: AbortCause::Dropped, receipt };
        Activity {
            steps: 9,
            uptime: Duration::from_millis(2500),
            max_num_seqs: 4,
            rows: vec![row],
            rows_left_out: 0,
            num_waiting: 3,
            waiting: vec![waiter],
            blocks: BlockMap { total: 6, blocks_per_cell: 1, cells: vec![0, 3, 3, 1, 0, 0] },
            aborts: vec![past],
        }
    }

    #[test]
    fn a_reading_has_the_shape_that_the_page_reads() {
        let stats = EngineStats {
            kv_blocks: BlockCounts { free: 3, owned: 2, cached: 1, total: 6 },
            uptime: Duration::from_millis(2500),
            ..EngineStats::default()
        };
        let event = serde_json::to_value(LiveEvent::new(&activity(), &stats)).unwrap();
        let expected = json!({
            "steps_total": 9, "uptime_seconds": 2.5, "max_num_seqs": 4,
            "rows": [{
                "request_id": "a", "index": 1, "stage": "decode", "prompt_tokens": 5, "computed_tokens": 6,
                "completion_tokens": 2, "kv_blocks": 2,
            }],
            "rows_left_out": 0, "num_waiting": 3,
            "waiting": [{
                "request_id": "a", "index": 0, "prompt_tokens": 5, "completion_tokens": 0, "is_resumed": false,
            }],
            "blocks": {"total": 6, "blocks_per_cell": 1, "runs": [[0, 1], [3, 2], [1, 1], [0, 2]]},
            "aborts": [{
                "number": 7, "at_uptime_seconds": 2.0, "cause": "dropped", "request_id": "a", "stage": "prefill",
                "completion_tokens": 0, "blocks_freed": 3, "rows_freed": 1, "seconds_to_free": 4e-5,
            }],
        });
        assert_eq!(event["activity"], expected);
        let stats = &event["stats"];
        assert_eq!(stats["kv_blocks"], json!({"total": 6, "free": 3, "owned": 2, "cached": 1}));
        assert_eq!((&stats["uptime_seconds"], &stats["draining"]), (&json!(2.5), &json!(false)));
        // What the page's scripts read is there.
        let page: String = page::ASSETS.iter().map(|asset| asset.text).collect();
        let read = page.match_indices("stats.").map(|(at, _)| {
            let rest = &page[at + "stats.".len()..];
            &rest[..rest.find(|c: char| !(c.is_ascii_lowercase() || c == '_')).unwrap_or(rest.len())]
        });
        let missing: Vec<&str> = read.filter(|name| stats.get(name).is_none_or(Value::is_null)).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
