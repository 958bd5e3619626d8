//! A scheduler, a pool and a device for tests of single rules: small, and driven by hand.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use tidemill_engine::{
    ids::{SeqId, TenantId, TokenId},
    kv::{BlockPool, CacheConfig},
    runner::StepQueue,
    sampling::Sampling,
    scheduler::{
        Effect, Limits, NewSequence, Note, Policy, Scheduler, SchedulerConfig, StepPlan, WaitReason,
    },
};

use crate::{
    device::{Device, Wires},
    sampling,
};

/// Tokens per block.
pub const BLOCK: usize = 4;

/// How a rig is built.
pub struct Setup {
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub long_prefill_token_threshold: usize,
    pub blocks: usize,
    pub policy: Policy,
    pub weights: Vec<(&'static str, u32)>,
    pub caching: bool,
    pub host_blocks: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            long_prefill_token_threshold: usize::MAX,
            blocks: 64,
            policy: Policy::Fcfs,
            weights: Vec::new(),
            caching: false,
            host_blocks: 0,
        }
    }
}

pub struct Rig {
    pub scheduler: Scheduler,
    pub steps: StepQueue<Device>,
    pub pool: BlockPool,
    pub notes: Vec<Note>,
}

impl Rig {
    pub fn new(setup: Setup) -> Self {
        let Setup { max_num_seqs, max_num_batched_tokens, long_prefill_token_threshold, .. } = setup;
        let Setup { blocks, policy, host_blocks, .. } = setup;
        let cache = CacheConfig { key: [7; 32], events: true, host_blocks };
        let pool = match setup.caching {
            true => BlockPool::with_cache(blocks, BLOCK, cache),
            false => BlockPool::new(blocks, BLOCK),
        };
        let limits = Limits { max_num_seqs, max_num_batched_tokens, long_prefill_token_threshold };
        let weights = setup.weights.iter().map(|&(name, weight)| (TenantId::new(name), weight)).collect();
        let wires = Rc::<RefCell<Wires>>::default();
        Self {
            scheduler: Scheduler::new(
                SchedulerConfig { limits, policy, weights, max_loras: 2 },
                pool.clone(),
            ),
            steps: StepQueue::new(Device::new(wires, BLOCK, blocks, host_blocks)),
            pool,
            notes: Vec::new(),
        }
    }

    /// A sequence that ends by its number of tokens alone, with a prompt of its own.
    pub fn sequence(&self, id: u64, prompt_len: usize, max_tokens: usize) -> NewSequence {
        NewSequence {
            id: SeqId(id),
            prompt: (0..prompt_len).map(|at| TokenId((id << 8) as u32 + at as u32)).collect(),
            sampling: Arc::new(Sampling { eos_token_ids: Vec::new(), ..sampling(max_tokens, 0) }),
            seed: id,
            prompt_of: None,
            priority: 0,
            tenant: TenantId::default(),
            pooling: None,
            is_whole: false,
            segments: None,
            root: self.pool.prefix_root(&["model"], id),
            adapter: None,
            constraint: None,
        }
    }

    pub fn add(&mut self, id: u64, prompt_len: usize, max_tokens: usize) {
        let new = self.sequence(id, prompt_len, max_tokens);
        self.scheduler.add(new);
    }

    /// Adds a sequence with these tokens as its prompt.
    pub fn add_prompt(&mut self, id: u64, prompt: &[TokenId], max_tokens: usize) {
        let new = self.sequence(id, 1, max_tokens);
        self.scheduler.add(NewSequence { prompt: prompt.into(), ..new });
    }

    /// Plans a step and launches it.
    pub fn launch(&mut self) -> StepPlan {
        self.launch_with(usize::MAX)
    }

    /// The same with so many tokens for prompts.
    pub fn launch_with(&mut self, prefill: usize) -> StepPlan {
        let plan = self.scheduler.plan(|_| prefill);
        if !plan.rows.is_empty() {
            self.steps.launch(plan.clone()).unwrap();
        }
        self.scheduler.check();
        self.scheduler.take_notes(&mut self.notes);
        plan
    }

    /// Takes the results of the oldest step in.
    pub fn finish(&mut self) -> Vec<Effect> {
        let (plan, output) = self.steps.finish().unwrap();
        let mut effects = Vec::new();
        self.scheduler.resolve(plan, output, &mut effects);
        self.scheduler.check();
        self.scheduler.take_notes(&mut self.notes);
        effects
    }

    /// One step after another.
    pub fn step(&mut self) -> StepPlan {
        let plan = self.launch();
        if !plan.rows.is_empty() {
            self.finish();
        }
        plan
    }

    /// Runs until nothing is left to run, and returns the tokens that were generated, in order.
    pub fn run(&mut self) -> Vec<(SeqId, TokenId)> {
        let mut tokens = Vec::new();
        while !self.launch().rows.is_empty() {
            tokens.extend(self.finish().into_iter().filter_map(|effect| match effect {
                Effect::Token { seq, token, .. } => Some((seq, token)),
                _ => None,
            }));
        }
        tokens
    }

    /// Who was admitted since the last call, in order, with what was found in the prefix cache.
    pub fn admitted(&mut self) -> Vec<(u64, usize)> {
        let notes = self.notes.drain(..);
        notes
            .filter_map(|note| match note {
                Note::Admitted { seq, cached_tokens, .. } => Some((seq.0, cached_tokens)),
                Note::Preempted { .. } | Note::Parked { .. } => None,
            })
            .collect()
    }

    pub fn preemptions(&self, id: u64) -> usize {
        self.scheduler.get(SeqId(id)).map_or(0, |seq| seq.num_preemptions())
    }

    pub fn waits_for(&mut self, id: u64) -> Option<WaitReason> {
        self.scheduler.explain(SeqId(id)).unwrap().waits_for
    }
}

/// Sequence, first position and number of tokens of each row.
pub fn shape(plan: &StepPlan) -> Vec<(u64, usize, usize)> {
    plan.rows.iter().map(|row| (row.seq.0, row.start, row.input.num_tokens())).collect()
}
