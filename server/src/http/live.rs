//! What the live page is told: the engine at work, as one JSON object per reading. Names are those of `tidemill.v1`.

use std::time::Duration;

use serde::Serialize;
use tidemill_engine::{
    EngineStats, Histogram,
    activity::{AbortCause, ActiveRow, Activity, BlockMap, PastAbort, Waiter},
    output::AbortStage,
    scheduler::Stage,
};

/// Time between two readings.
pub const INTERVAL: Duration = Duration::from_millis(200);

/// One reading.
#[derive(Debug, Serialize)]
pub struct LiveEvent {
    /// Batch, queue, blocks and the last aborts.
    pub activity: LiveActivity,
    /// Gauges, counters and distributions.
    pub stats: LiveStats,
}

impl LiveEvent {
    /// A reading of the engine.
    pub fn new(activity: &Activity, stats: &EngineStats) -> Self {
        Self { activity: LiveActivity::new(activity), stats: LiveStats::new(stats) }
    }
}

/// The engine between two steps.
#[derive(Debug, Serialize)]
pub struct LiveActivity {
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
pub struct LiveStats {
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
        stage: match receipt.stage {
            AbortStage::Unknown => "unknown",
            AbortStage::Queued => "queued",
            AbortStage::Prefill => "prefill",
            AbortStage::Decode => "decode",
            AbortStage::Finished => "finished",
        },
        completion_tokens: receipt.completion_tokens,
        blocks_freed: receipt.blocks_freed,
        rows_freed: receipt.rows_freed,
        seconds_to_free: receipt.time_to_free.as_secs_f64(),
    }
}

fn histogram(histogram: &Histogram) -> LiveHistogram {
    LiveHistogram { bounds: histogram.bounds.to_vec(), counts: histogram.counts.clone() }
}
