//! Gauges and counters, readable from any thread without asking the engine thread.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::kv::{BlockCounts, BlockPool};

/// One reading.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences in the batch.
    pub num_requests_running: usize,
    /// Sequences that wait.
    pub num_requests_waiting: usize,
    /// Sequences that are parked: their client does not read.
    pub num_requests_parked: usize,
    /// KV blocks by state.
    pub kv_blocks: BlockCounts,
    /// Counters since the start.
    pub counters: Counters,
    /// Distributions since the start.
    pub histograms: Histograms,
    /// Since a step was last launched or done; zero when none is in flight.
    pub heartbeat_age: Duration,
    /// Since the start.
    pub uptime: Duration,
    /// New requests are refused.
    pub draining: bool,
}

/// Counters since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Prompt tokens of admitted requests.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Steps run.
    pub steps: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Requests that ended by stop or length.
    pub finished: u64,
    /// Requests that were aborted.
    pub aborted: u64,
    /// Requests that were refused after validation (queue full, duplicate id, draining).
    pub refused: u64,
    /// Requests that ended in an error.
    pub failed: u64,
    /// Tokens that were looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Of these, found.
    pub prefix_cache_hits: u64,
    /// Blocks copied out to host memory.
    pub blocks_saved: u64,
    /// Blocks copied back in.
    pub blocks_loaded: u64,
    /// Times that sequences were parked because their client did not read.
    pub parked: u64,
}

/// Distributions since the start; seconds unless said otherwise.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histograms {
    /// From submission to the first token.
    pub time_to_first_token: Histogram,
    /// Between two tokens of one sequence.
    pub inter_token_latency: Histogram,
    /// From submission to the end, of requests that ended by stop or length.
    pub e2e_request_latency: Histogram,
    /// From submission to the first step.
    pub request_queue_time: Histogram,
    /// From the first step to the first token.
    pub request_prefill_time: Histogram,
    /// From the first token to the end.
    pub request_decode_time: Histogram,
    /// Tokens computed per step.
    pub iteration_tokens: Histogram,
    /// From the engine's receipt of an abort until everything was free.
    pub abort_to_free: Histogram,
    /// Planning a step.
    pub step_plan: Histogram,
    /// A step on the device.
    pub step_execute: Histogram,
    /// Taking a step's results in.
    pub step_resolve: Histogram,
}

/// How often values fell into which range.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    /// Upper bounds, inclusive, rising.
    pub bounds: &'static [f64],
    /// `bounds.len() + 1` counts, each of its own range: the last is for what is over the last bound.
    pub counts: Vec<u64>,
    /// Sum of all values.
    pub sum: f64,
}

/// What the engine thread publishes.
#[derive(Debug)]
pub(crate) struct SharedStats {
    started: Instant,
    pool: BlockPool,
    published: Mutex<Published>,
    /// Refusals happen on the callers' threads.
    refused: AtomicU64,
    draining: AtomicBool,
    /// Milliseconds after `started` when a step was last launched or done.
    heartbeat_ms: AtomicU64,
    busy: AtomicBool,
}

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Published {
    pub running: usize,
    pub waiting: usize,
    pub counters: Counters,
}

impl SharedStats {
    pub(crate) fn new(pool: BlockPool) -> Self {
        Self {
            started: Instant::now(),
            pool,
            published: Mutex::default(),
            refused: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            heartbeat_ms: AtomicU64::new(0),
            busy: AtomicBool::new(false),
        }
    }

    pub(crate) fn publish(&self, published: Published, busy: bool) {
        *self.published.lock() = published;
        self.busy.store(busy, Relaxed);
    }

    /// Notes that a step was launched or done. Nothing else is a sign of life: an engine whose step hangs still handles commands.
    pub(crate) fn beat(&self) {
        self.heartbeat_ms.store(self.started.elapsed().as_millis() as u64, Relaxed);
    }

    pub(crate) fn count_refusal(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    pub(crate) fn set_draining(&self) {
        self.draining.store(true, Relaxed);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    pub(crate) fn read(&self) -> EngineStats {
        let published = *self.published.lock();
        let uptime = self.started.elapsed();
        let idle_for = uptime.saturating_sub(Duration::from_millis(self.heartbeat_ms.load(Relaxed)));
        EngineStats {
            num_requests_running: published.running,
            num_requests_waiting: published.waiting,
            num_requests_parked: 0,
            histograms: Histograms::default(),
            kv_blocks: self.pool.counts(),
            counters: Counters {
                refused: published.counters.refused + self.refused.load(Relaxed),
                ..published.counters
            },
            heartbeat_age: if self.busy.load(Relaxed) { idle_for } else { Duration::ZERO },
            uptime,
            draining: self.is_draining(),
        }
    }
}
