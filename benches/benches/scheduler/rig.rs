//! A scheduler under load without a model: rows that generate for ever, and results that are made outside of what is measured.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use tidemill_engine::{
    ids::{SeqId, TenantId, TokenId},
    kv::{BlockHash, BlockPool, CacheConfig},
    sampling::Sampling,
    scheduler::{
        Effect, Limits, NewSequence, Note, Policy, RowOutput, RowResult, Scheduler, SchedulerConfig,
        StepOutput, StepPlan,
    },
};

/// Tokens per block.
pub const BLOCK_SIZE: usize = 16;
/// Tokens of a step: what a GPU has by default.
pub const MAX_NUM_BATCHED_TOKENS: usize = 2048;
/// Rows of a batch.
pub const MAX_NUM_SEQS: usize = 256;

/// A scheduler, its steps in flight, and the memory that its caller would keep.
pub struct Rig {
    pub scheduler: Scheduler,
    pub pool: BlockPool,
    pub root: BlockHash,
    in_flight: VecDeque<StepPlan>,
    effects: Vec<Effect>,
    notes: Vec<Note>,
    next_id: u64,
}

/// What is asked for: greedy, and no token ends it.
fn sampling(max_tokens: usize) -> Arc<Sampling> {
    Arc::new(Sampling {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 0,
        max_tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        eos_token_ids: Vec::new(),
        logprobs: None,
        prompt_logprobs: None,
    })
}

/// A prompt that shares its first block with no other number's.
pub fn prompt(number: u64, len: usize) -> Arc<[TokenId]> {
    let own = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    (0..len as u64).map(|at| TokenId((own.wrapping_add(at * 7919) & 0x7FFF_FFFF) as u32)).collect()
}

impl Rig {
    /// An empty batch over `blocks` blocks.
    pub fn new(policy: Policy, blocks: usize) -> Self {
        let cache = CacheConfig { key: [7; 32], events: false, host_blocks: 0 };
        let pool = BlockPool::with_cache(blocks, BLOCK_SIZE, cache);
        let limits = Limits {
            max_num_seqs: MAX_NUM_SEQS,
            max_num_batched_tokens: MAX_NUM_BATCHED_TOKENS,
            long_prefill_token_threshold: MAX_NUM_BATCHED_TOKENS / 2,
        };
        let config = SchedulerConfig { limits, policy, weights: BTreeMap::new(), max_loras: 0 };
        let scheduler = Scheduler::new(config, pool.clone());
        let root = scheduler.prefix_root(&["model"], 0);
        Self {
            scheduler,
            pool,
            root,
            in_flight: VecDeque::new(),
            effects: Vec::new(),
            notes: Vec::new(),
            next_id: 0,
        }
    }

    /// `rows` rows that generate, with contexts of about `context` tokens: their blocks fill at different steps, as those of requests that came
    /// at different times do. `more` tokens are asked for.
    pub fn decoding(policy: Policy, rows: usize, context: usize, more: usize) -> Self {
        // While the last prompts are read, the first rows generate.
        let fill = rows * (context + BLOCK_SIZE) / (MAX_NUM_BATCHED_TOKENS - rows) + 64;
        let blocks = rows * (context + more + fill + 64).div_ceil(BLOCK_SIZE) + 4096;
        let mut rig = Self::new(policy, blocks);
        for row in 0..rows {
            rig.arrive(prompt(row as u64, context + row % BLOCK_SIZE), more + fill, 0);
        }
        while rig.scheduler.num_waiting() > 0 || rig.num_prefilling() > 0 {
            rig.step();
        }
        rig
    }

    fn num_prefilling(&self) -> usize {
        let newest = self.in_flight.back();
        newest.map_or(0, |plan| plan.rows.iter().filter(|row| row.input.num_tokens() > 1).count())
    }

    /// A request of one of 100 tenants and 10 priorities arrives; the larger `class`, the later it is served.
    pub fn arrive(&mut self, prompt: Arc<[TokenId]>, max_tokens: usize, class: u64) -> SeqId {
        let new = self.request(prompt, max_tokens, class);
        let id = new.id;
        self.scheduler.add(new);
        id
    }

    /// The same, not yet handed over.
    pub fn request(&mut self, prompt: Arc<[TokenId]>, max_tokens: usize, class: u64) -> NewSequence {
        self.next_id += 1;
        NewSequence {
            id: SeqId(self.next_id),
            prompt,
            sampling: sampling(max_tokens),
            seed: 0,
            prompt_of: None,
            priority: (class % 10) as i32,
            tenant: TenantId::new(format!("tenant-{}", class % 100)),
            pooling: None,
            is_whole: false,
            segments: None,
            root: self.root,
            constraint: None,
            adapter: None,
        }
    }

    /// One more step in flight.
    pub fn plan(&mut self) {
        let plan = self.scheduler.plan(|_| usize::MAX);
        if !plan.rows.is_empty() {
            self.in_flight.push_back(plan);
        }
    }

    /// The results of the oldest step in flight, if as many as `depth` are.
    pub fn results(&mut self, depth: usize) -> Option<(StepPlan, StepOutput)> {
        let plan = (self.in_flight.len() >= depth).then(|| self.in_flight.pop_front()).flatten()?;
        let result = |sampled| {
            RowResult::Done(RowOutput { sampled, logprobs: None, prompt_logprobs: vec![], states: vec![] })
        };
        let token = |position: usize| TokenId((position * 31 % 50_000) as u32);
        let rows = plan.rows.iter().map(|row| result(row.sample.as_ref().map(|s| token(s.position))));
        let output = StepOutput { rows: rows.collect() };
        Some((plan, output))
    }

    /// Takes them in. Returns how many effects they have.
    pub fn resolve(&mut self, (plan, output): (StepPlan, StepOutput)) -> usize {
        self.effects.clear();
        self.scheduler.resolve(plan, output, &mut self.effects);
        self.notes.clear();
        self.scheduler.take_notes(&mut self.notes);
        self.effects.len()
    }

    /// Plans a step and takes the one before it in.
    pub fn step(&mut self) {
        self.plan();
        if let Some(results) = self.results(2) {
            self.resolve(results);
        }
    }

    /// Takes everything in that is in flight.
    pub fn settle(&mut self) {
        while let Some(results) = self.results(1) {
            self.resolve(results);
        }
    }
}
