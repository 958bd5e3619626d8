//! The scheduler: which tokens of which sequences a step computes, and what its results mean.
//!
//! A pure machine: [`Scheduler::plan`] and [`Scheduler::resolve`] are functions of its state alone. No clock, no I/O, no device,
//! no text; it runs in tests against a fake runner. Sequences arrive in order of their [`SeqId`]; the batch and the queue are kept
//! in that order, so "oldest first" and "preempt the youngest" need no further bookkeeping.
//!
//! There is no prefill mode. Every sequence has `num_computed` tokens in the KV cache and wants to reach its length; a
//! step hands out at most `max_num_batched_tokens`, to decode rows first, then to prompts in chunks, oldest first.
//!
//! A step may be planned while the one before it runs. A sequence's plan then goes on from where the step in flight will leave it;
//! a token that is being sampled there is an input that the host need not know ([`TokenInput::Sampled`]). Steps run in the order
//! in which they were planned, and that order is the fence for the blocks: a block that is freed while a step in flight
//! still writes to it is given to a later step only, which writes after it.

mod plan;
mod policy;
mod resolve;
mod sequence;

use std::collections::BTreeMap;

pub use plan::{PlanRow, SamplePlan, StepPlan, TokenInput};
pub use policy::{Policy, WaitReason};
pub use resolve::{Effect, RowOutput, RowResult, StepOutput};
use sequence::Place;
pub use sequence::{NewSequence, Sequence};

use crate::{ids::SeqId, kv::BlockPool};

/// Steps that may be planned and not resolved: one runs, and one is queued behind it.
pub const MAX_IN_FLIGHT: usize = 2;

/// What a step may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences in the batch.
    pub max_num_seqs: usize,
    /// Tokens per step over all sequences.
    pub max_num_batched_tokens: usize,
}

/// What a removed sequence gave back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    /// Where it was.
    pub stage: Stage,
    /// Tokens it had generated.
    pub completion_tokens: usize,
    /// Blocks that are free now and were not before.
    pub blocks_freed: usize,
    /// Rows of the batch that are free now: 0 or 1.
    pub rows_freed: usize,
    /// Times it had been preempted.
    pub num_preemptions: usize,
}

/// Where a live sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Waiting for a place in the batch, for the first time or after a preemption.
    Queued,
    /// In the batch; its prompt (or, after a preemption, everything it had) is being read.
    Prefill,
    /// In the batch; generating.
    Decode,
}

/// All live sequences and the pool their blocks come from.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    seqs: BTreeMap<SeqId, Sequence>,
    /// Sequences in the batch, oldest first. Everything else in `seqs` waits.
    running: Vec<SeqId>,
    preemptions: u64,
    /// Steps that were planned and not resolved.
    num_in_flight: usize,
    /// A row found no block while a step was in flight.
    short_of_blocks: bool,
}

impl Scheduler {
    /// A scheduler without sequences. Both limits are at least 1.
    pub fn new(limits: Limits, pool: BlockPool) -> Self {
        assert!(
            limits.max_num_seqs >= 1 && limits.max_num_batched_tokens >= 1,
            "limits of 0 would never schedule anything"
        );
        Self {
            limits,
            pool,
            seqs: BTreeMap::new(),
            running: Vec::new(),
            preemptions: 0,
            num_in_flight: 0,
            short_of_blocks: false,
        }
    }

    /// Puts a sequence into the queue. The caller made sure that the pool can hold it alone (`fits`).
    pub fn add(&mut self, new: NewSequence) {
        debug_assert!(
            self.seqs.last_key_value().is_none_or(|(&last, _)| last < new.id),
            "ids rise with arrival"
        );
        self.seqs.insert(new.id, Sequence::new(new, self.pool.table()));
    }

    /// Whether a sequence of this many tokens in all fits into the empty pool: its last token is never written.
    pub fn fits(&self, prompt_len: usize, max_tokens: usize) -> bool {
        (prompt_len + max_tokens - 1).div_ceil(self.pool.block_size()) <= self.pool.total()
    }

    /// Takes a sequence out at any stage and frees what it held, at once, even while steps that contain it are in flight.
    /// `None` when it is gone already.
    pub fn remove(&mut self, id: SeqId) -> Option<Removed> {
        let mut seq = self.seqs.remove(&id)?;
        let stage = seq.stage();
        let row = self.running.iter().position(|&r| r == id);
        if let Some(row) = row {
            self.running.remove(row);
        }
        Some(Removed {
            stage,
            completion_tokens: seq.completion_tokens(),
            blocks_freed: seq.table.release(),
            rows_freed: usize::from(row.is_some()),
            num_preemptions: seq.num_preemptions,
        })
    }

    /// Sequences in the batch.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait.
    pub fn num_waiting(&self) -> usize {
        self.seqs.len() - self.running.len()
    }

    /// Steps that were planned and not resolved.
    pub fn num_in_flight(&self) -> usize {
        self.num_in_flight
    }

    /// Preemptions since the start.
    pub fn num_preemptions(&self) -> u64 {
        self.preemptions
    }

    /// A live sequence.
    pub fn get(&self, id: SeqId) -> Option<&Sequence> {
        self.seqs.get(&id)
    }

    /// Checks what must hold between steps: limits kept, the batch in order of age, every reference accounted for.
    ///
    /// # Panics
    /// When it does not hold: a bug of the scheduler, never of a request.
    pub fn check(&self) {
        assert!(self.running.len() <= self.limits.max_num_seqs, "more rows than max_num_seqs");
        assert!(self.running.is_sorted(), "the batch is kept in order of age");
        assert!(self.pool.is_consistent(), "a block is free and referenced, or neither");
        let mut held: Vec<_> = self.seqs.values().flat_map(|s| s.table.ids()).collect();
        held.sort_unstable();
        held.dedup();
        let counts = self.pool.counts();
        assert_eq!(held.len(), counts.owned, "a block is owned by nobody");
        assert_eq!(counts.free + counts.owned + counts.cached, counts.total);
        for (id, seq) in &self.seqs {
            let running = self.running.binary_search(id).is_ok();
            assert_eq!(running, seq.place == Place::Batch, "{id:?} is in the wrong place");
            assert!(running || seq.table.ids().is_empty(), "a waiting sequence holds blocks");
            assert!(seq.table.capacity() >= seq.num_planned, "a planned token has no slot");
            assert!(seq.num_computed <= seq.num_planned, "computed, but never planned");
            let at_rest = self.num_in_flight == 0 || !running;
            assert!(!at_rest || seq.num_computed == seq.num_planned, "planned, but in no step");
            assert!(seq.num_sampling() <= self.num_in_flight, "a step samples one token of a sequence");
        }
    }
}
