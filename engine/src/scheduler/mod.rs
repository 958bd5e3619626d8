//! The scheduler: which tokens of which sequences a step computes, and what its results mean.
//!
//! A pure machine: [`Scheduler::plan`] and [`Scheduler::resolve`] are functions of its state alone. No clock, no I/O, no device,
//! no text; it runs in tests against a fake runner. Sequences arrive in order of their [`SeqId`]. The batch is kept in the order of rank: by
//! priority where it counts, then by age. The first of it always advances; the last is preempted first.
//!
//! There is no prefill mode. Every sequence has `num_computed` tokens in the KV cache and wants to reach its length; a
//! step hands out at most `max_num_batched_tokens`, to decode rows first, then to prompts in chunks ([`Scheduler::plan`]). Who gets a row is the
//! queue's to say ([`Policy`]). A sequence that waits holds no blocks: what it had computed is in the prefix cache, and is found there
//! again unless it was given up meanwhile.
//!
//! A step may be planned while the one before it runs. A sequence's plan then goes on from where the step in flight will leave it;
//! a token that is being sampled there is an input that the host need not know ([`TokenInput::Sampled`]). Steps run in the order
//! in which they were planned, and that order is the fence for the blocks: a block that is freed while a step in flight
//! still writes to it is given to a later step only, which writes after it.
//!
//! Some sequences are whole ([`NewSequence::is_whole`]): they are admitted when a step has room for all of their tokens, and are over when it is resolved. So
//! they are never read in parts, and nobody takes their blocks halfway.
//!
//! The tokens of a sequence may be constrained ([`Constraint`](crate::constraint::Constraint)). What its newest token allows is found out when that token is
//! known, in [`Scheduler::resolve`]; so such a sequence sits the step out that is planned meanwhile, unless its next token is free
//! whatever comes. Tokens that are forced are appended at once, handed out like any others, and computed by the next step in one row.

mod activity;
mod adapters;
mod admit;
mod check;
mod explain;
pub mod fair;
mod form;
mod pacer;
mod plan;
mod policy;
mod resolve;
mod sequence;
mod step;
mod waiting;

use std::collections::BTreeMap;

pub use activity::{BatchRow, WaitingRow};
pub use explain::Standing;
pub use pacer::Pacer;
pub use policy::{Policy, WaitReason};
pub use resolve::{Effect, RowOutput, RowResult, StepOutput};
use rustc_hash::FxHashMap;
use sequence::Place;
pub use sequence::{NewSequence, Sequence};
pub use step::{PlanRow, SamplePlan, StepPlan, TokenInput};
use waiting::{Turn, Waiting};

use crate::{
    ids::{SeqId, TenantId},
    kv::{BlockHash, BlockPool},
    planted::{Bug, planted},
};

/// Steps that may be planned and not resolved: one runs, and one is queued behind it.
pub const MAX_IN_FLIGHT: usize = 2;

/// What a step may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences in the batch.
    pub max_num_seqs: usize,
    /// Tokens per step over all sequences; at least `max_num_seqs`, so that a prompt always finds some beside the decode rows.
    pub max_num_batched_tokens: usize,
    /// Prompts with more tokens to compute are long: the oldest of them gets at most so many in a step, and the others none, as long as there is
    /// something else to compute.
    pub long_prefill_token_threshold: usize,
}

/// How to schedule.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// What a step may use.
    pub limits: Limits,
    /// Whose turn it is.
    pub policy: Policy,
    /// Shares of tenants under [`Policy::Fair`]; whoever is not named has 1.
    pub weights: BTreeMap<TenantId, u32>,
    /// Adapters in the batch at a time.
    pub max_loras: usize,
}

/// What a removed sequence gave back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    /// Where it was.
    pub stage: Stage,
    /// Tokens it had generated.
    pub completion_tokens: usize,
    /// Blocks that nobody references now and somebody did before: they are free, or cached.
    pub blocks_freed: usize,
    /// Rows of the batch that are free now: 0 or 1.
    pub rows_freed: usize,
    /// Times it had been preempted.
    pub num_preemptions: usize,
}

/// Where a live sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Waiting for a place in the batch, for the first time or again.
    Queued,
    /// In the batch; its prompt (or, after a preemption, everything it had) is being read.
    Prefill,
    /// In the batch; generating.
    Decode,
}

/// Something that happened to a sequence besides results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// It got a row.
    Admitted {
        /// Who.
        seq: SeqId,
        /// Tokens that were found in the prefix cache.
        cached_tokens: usize,
        /// Tokens that were looked up there.
        looked_up: usize,
        /// It had a row before.
        resumed: bool,
    },
    /// It lost its row and its blocks to others.
    Preempted {
        /// Who.
        seq: SeqId,
    },
    /// It gave its row and its blocks up because its client does not read.
    Parked {
        /// Who.
        seq: SeqId,
    },
}

/// All live sequences and the pool their blocks come from.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    policy: Policy,
    pool: BlockPool,
    seqs: FxHashMap<SeqId, Sequence>,
    /// Sequences in the batch, in order of [rank](Self::rank).
    running: Vec<SeqId>,
    waiting: Waiting,
    slots: adapters::Slots,
    num_held: usize,
    num_parked: usize,
    /// Live sequences whose tokens are constrained.
    num_formed: usize,
    preemptions: u64,
    /// Steps that were planned and not resolved.
    num_in_flight: usize,
    /// Somebody needs blocks or a row that only a preemption can give, and a step is in flight.
    must_settle: bool,
    notes: Vec<Note>,
    spare: step::Spare,
}

impl Scheduler {
    /// A scheduler without sequences.
    ///
    /// # Panics
    /// With limits that would never schedule something: 0, or fewer tokens than sequences.
    pub fn new(config: SchedulerConfig, pool: BlockPool) -> Self {
        let SchedulerConfig { limits, policy, weights, max_loras } = config;
        assert!(
            limits.max_num_seqs >= 1 && limits.max_num_batched_tokens >= limits.max_num_seqs,
            "a step has a token for each of its sequences, and at least one"
        );
        Self {
            limits,
            policy,
            pool,
            seqs: FxHashMap::default(),
            running: Vec::new(),
            waiting: Waiting::new(policy, weights),
            slots: adapters::Slots::new(max_loras),
            num_held: 0,
            num_parked: 0,
            num_formed: 0,
            preemptions: 0,
            num_in_flight: 0,
            must_settle: false,
            notes: Vec::new(),
            spare: step::Spare::default(),
        }
    }

    /// Puts a sequence into the queue. Its id is higher than all before it, and the caller made sure that the pool can hold it alone (`fits`).
    pub fn add(&mut self, new: NewSequence) {
        let (id, prompt_of) = (new.id, new.prompt_of);
        let table = self.pool.table(new.root);
        let mut seq = Sequence::new(new, table);
        let owner = prompt_of.and_then(|owner| self.seqs.get_mut(&owner)).filter(|owner| !owner.has_prompt());
        match owner {
            Some(owner) => {
                owner.held.push(id);
                seq.place = Place::Held;
                self.num_held += 1;
            }
            None => self.waiting.push(&seq.turn),
        }
        self.num_formed += usize::from(seq.form.is_some());
        let before = self.seqs.insert(id, seq);
        debug_assert!(before.is_none(), "ids rise with arrival");
    }

    /// Whether a sequence of this many tokens in all fits into the empty pool: its last token is never written.
    pub fn fits(&self, prompt_len: usize, max_tokens: usize) -> bool {
        (prompt_len + max_tokens - 1).div_ceil(self.pool.block_size()) <= self.pool.total()
    }

    /// Takes a sequence out at any stage and frees what it held, at once, even while steps that contain it are in flight.
    /// `None` when it is gone already.
    pub fn remove(&mut self, id: SeqId) -> Option<Removed> {
        let mut seq = self.seqs.remove(&id)?;
        self.num_formed -= usize::from(seq.form.is_some());
        let stage = seq.stage();
        let place = seq.place;
        match place {
            Place::Held => {
                self.num_held -= 1;
                // Its owner's list keeps the name; nobody answers to it any more.
            }
            Place::Queue => self.waiting.remove(&seq.turn),
            Place::Batch => self.leave_batch(&seq.turn),
            Place::Parked => self.num_parked -= 1,
        }
        self.pass_prompt_on(std::mem::take(&mut seq.held), seq.has_prompt());
        Some(Removed {
            stage,
            completion_tokens: seq.completion_tokens(),
            blocks_freed: match planted(Bug::LeakOnAbortInPrefill) && stage == Stage::Prefill {
                true => std::mem::ManuallyDrop::new(seq.table).ids().len(),
                false => seq.table.release(),
            },
            rows_freed: usize::from(place == Place::Batch),
            num_preemptions: seq.num_preemptions,
        })
    }

    /// Stops scheduling a sequence whose client does not read. It gives its row and its blocks up: at once, or when the steps in flight that
    /// contain it are resolved. Their tokens still come.
    pub fn park(&mut self, id: SeqId) {
        let Some(seq) = self.seqs.get_mut(&id) else { return };
        if !std::mem::replace(&mut seq.is_unread, true) {
            self.settle_unread(id);
        }
    }

    /// Takes a parked sequence back into the queue, at the head of its class.
    pub fn unpark(&mut self, id: SeqId) {
        let Some(seq) = self.seqs.get_mut(&id) else { return };
        seq.is_unread = false;
        if seq.place == Place::Parked && !planted(Bug::UnparkForgotten) {
            seq.place = Place::Queue;
            self.num_parked -= 1;
            self.waiting.push(&seq.turn);
        }
    }

    /// Parks a sequence that is to be parked, unless a step in flight contains it.
    fn settle_unread(&mut self, id: SeqId) {
        let Some(seq) = self.seqs.get_mut(&id).filter(|seq| seq.is_unread && !seq.is_in_flight()) else {
            return;
        };
        match seq.place {
            // Where it comes from then is where it is parked.
            Place::Held | Place::Parked => return,
            Place::Queue => {
                let turn = seq.turn.clone();
                seq.place = Place::Parked;
                self.waiting.remove(&turn);
            }
            Place::Batch => {
                seq.release(Place::Parked);
                let turn = seq.turn.clone();
                self.leave_batch(&turn);
            }
        }
        self.num_parked += 1;
        self.notes.push(Note::Parked { seq: id });
    }

    /// Completions that were held for a prompt go on: it is there, or one of them reads it for the others.
    fn pass_prompt_on(&mut self, held: Vec<SeqId>, is_read: bool) {
        let mut held = held.into_iter().filter(|id| self.seqs.contains_key(id)).collect::<Vec<_>>();
        let free = if is_read { held.len() } else { held.len().min(1) };
        let rest = held.split_off(free);
        for id in held {
            let seq = self.seqs.get_mut(&id).expect("filtered above");
            seq.place = Place::Queue;
            self.num_held -= 1;
            self.waiting.push(&seq.turn);
            if !rest.is_empty() {
                seq.held = rest.clone();
            }
            self.settle_unread(id);
        }
    }

    /// Order in the batch: who comes first, and who last when somebody must go.
    fn rank(&self, turn: &Turn) -> (i32, SeqId) {
        (if self.policy == Policy::Priority { turn.priority } else { 0 }, turn.id)
    }

    fn place_in_batch(&self, turn: &Turn) -> Result<usize, usize> {
        let rank = self.rank(turn);
        self.running.binary_search_by_key(&rank, |id| match self.seqs.get(id) {
            Some(seq) => self.rank(&seq.turn),
            // The one that is leaving.
            None => rank,
        })
    }

    fn leave_batch(&mut self, turn: &Turn) {
        let at = self.place_in_batch(turn).expect("a running sequence is in the batch");
        self.running.remove(at);
    }

    /// The beginning of a request's chains of blocks; see [`BlockPool::prefix_root`].
    pub fn prefix_root(&self, parts: &[&str], request: u64) -> BlockHash {
        self.pool.prefix_root(parts, request)
    }

    /// Sequences in the batch.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for a row.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len() + self.num_held
    }

    /// Sequences that are parked.
    pub fn num_parked(&self) -> usize {
        self.num_parked
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

    /// Moves what happened since the last call to the end of `notes`.
    pub fn take_notes(&mut self, notes: &mut Vec<Note>) {
        notes.append(&mut self.notes);
    }
}
