//! Gauges and counters, readable from any thread without asking the engine thread.

mod histogram;

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

pub use histogram::{Histogram, Histograms};
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
    /// KV blocks that are kept in host memory.
    pub num_host_blocks_used: usize,
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
    /// Of these, the ones whose last completion ended by length.
    pub finished_by_length: u64,
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
    /// Times that requests were parked because their client did not read.
    pub parked: u64,
    /// Ended requests whose life found no room on its way to whoever keeps records.
    pub lives_lost: u64,
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

/// What only the engine thread knows.
#[derive(Debug, Default)]
pub(crate) struct Published {
    pub running: usize,
    pub waiting: usize,
    pub parked: usize,
    pub counters: Counters,
    pub histograms: Histograms,
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

    /// Lets the engine thread write what it knows.
    pub(crate) fn publish(&self, busy: bool, write: impl FnOnce(&mut Published)) {
        write(&mut self.published.lock());
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

    /// How long after the start a moment is.
    pub(crate) fn since_start(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.started)
    }

    pub(crate) fn read(&self) -> EngineStats {
        let published = self.published.lock();
        let uptime = self.started.elapsed();
        let idle_for = uptime.saturating_sub(Duration::from_millis(self.heartbeat_ms.load(Relaxed)));
        EngineStats {
            num_requests_running: published.running,
            num_requests_waiting: published.waiting,
            num_requests_parked: published.parked,
            histograms: published.histograms.clone(),
            kv_blocks: self.pool.counts(),
            num_host_blocks_used: self.pool.num_host_blocks_used(),
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
