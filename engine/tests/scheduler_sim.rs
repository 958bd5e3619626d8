//! The scheduler in a simulator: no kernels, no threads, no clock.
//!
//! The simulated model computes `next token = H(seed, all previous tokens)` and reads the previous tokens back through the
//! block table from simulated blocks, so keys and values that are lost, stale, duplicated or shared by mistake change the output. After
//! every step everything that must hold is checked. A failing seed is printed and replays.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    panic,
    sync::Arc,
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tidemill_engine::{
    ids::{SeqId, TokenId},
    kv::BlockPool,
    output::FinishReason,
    sampling::Sampling,
    scheduler::{Effect, Limits, NewSequence, RowOutput, RowResult, Scheduler, StepOutput, StepPlan},
};

const VOCAB: u64 = 97;
const EOS: TokenId = TokenId(13);

/// The simulated model's opinion on what follows.
fn next_token(seed: u64, previous: &[TokenId]) -> TokenId {
    let mut hasher = DefaultHasher::new();
    (seed, previous).hash(&mut hasher);
    TokenId((hasher.finish() % VOCAB) as u32)
}

/// Simulated keys and values: what was written to each slot.
struct SimRunner {
    block_size: usize,
    slots: Vec<Option<TokenId>>,
}

impl SimRunner {
    fn run(&mut self, plan: &StepPlan) -> StepOutput {
        for row in &plan.rows {
            for (position, &token) in (row.start..).zip(&row.tokens) {
                let slot = self.slot(&row.blocks, position);
                self.slots[slot] = Some(token);
            }
        }
        let row = |row: &tidemill_engine::scheduler::PlanRow| {
            let sampled = row.sample.as_ref().map(|sample| {
                let read =
                    |position| self.slots[self.slot(&row.blocks, position)].expect("reads an empty slot");
                next_token(sample.seed, &(0..sample.position).map(read).collect::<Vec<_>>())
            });
            RowResult::Done(RowOutput { sampled, logprobs: None, prompt_logprobs: Vec::new() })
        };
        StepOutput { rows: plan.rows.iter().map(row).collect() }
    }

    fn slot(&self, blocks: &[tidemill_engine::ids::BlockId], position: usize) -> usize {
        blocks[position / self.block_size].0 as usize * self.block_size + position % self.block_size
    }
}

fn sampling(max_tokens: usize, min_tokens: usize) -> Sampling {
    Sampling {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 0,
        max_tokens,
        min_tokens,
        stop_token_ids: Vec::new(),
        eos_token_ids: vec![EOS],
        logprobs: None,
        prompt_logprobs: None,
    }
}

/// A live request of the simulation.
struct Live {
    prompt: Arc<[TokenId]>,
    sampling: Arc<Sampling>,
    seed: u64,
    output: Vec<TokenId>,
}

impl Live {
    /// What the request gives when it runs alone. End-of-sequence tokens before `min_tokens` do not end it here either: the
    /// simulated model cannot be forbidden to choose them.
    fn alone(&self) -> Vec<TokenId> {
        let mut tokens = self.prompt.to_vec();
        loop {
            tokens.push(next_token(self.seed, &tokens));
            let output = &tokens[self.prompt.len()..];
            let stopped = output.len() >= self.sampling.min_tokens && output.last() == Some(&EOS);
            if stopped || output.len() == self.sampling.max_tokens {
                return output.to_vec();
            }
        }
    }
}

struct Sim {
    rng: StdRng,
    limits: Limits,
    pool: BlockPool,
    scheduler: Scheduler,
    runner: SimRunner,
    live: BTreeMap<SeqId, Live>,
    next_id: u64,
    finished: usize,
}

impl Sim {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let block_size = rng.random_range(1..=8);
        let blocks = rng.random_range(1..=40);
        let limits = Limits {
            max_num_seqs: rng.random_range(1..=8),
            max_num_batched_tokens: rng.random_range(1..=48),
        };
        let pool = BlockPool::new(blocks, block_size);
        Self {
            scheduler: Scheduler::new(limits, pool.clone()),
            runner: SimRunner { block_size, slots: vec![None; blocks * block_size] },
            rng,
            limits,
            pool,
            live: BTreeMap::new(),
            next_id: 0,
            finished: 0,
        }
    }

    fn arrive(&mut self) {
        let prompt_len = self.rng.random_range(1..=40);
        let max_tokens = self.rng.random_range(1..=30);
        if !self.scheduler.fits(prompt_len, max_tokens) {
            return; // Refused at admission: it can never fit.
        }
        let token = |rng: &mut StdRng| TokenId(rng.random_range(0..VOCAB as u32));
        let prompt: Arc<[TokenId]> = (0..prompt_len).map(|_| token(&mut self.rng)).collect();
        let min_tokens = self.rng.random_range(0..=max_tokens);
        let sampling = Arc::new(sampling(max_tokens, min_tokens));
        let first = SeqId(self.next_id);
        for _ in 0..self.rng.random_range(1..=3) {
            let id = SeqId(self.next_id);
            self.next_id += 1;
            let new = NewSequence {
                id,
                prompt: prompt.clone(),
                sampling: sampling.clone(),
                seed: id.0,
                prompt_of: (id != first).then_some(first),
            };
            self.scheduler.add(new);
            let live =
                Live { prompt: prompt.clone(), sampling: sampling.clone(), seed: id.0, output: Vec::new() };
            self.live.insert(id, live);
        }
    }

    fn abort_someone(&mut self) {
        let pick = self.rng.random_range(0..self.live.len().max(1));
        let Some(&id) = self.live.keys().nth(pick) else { return };
        let before = self.pool.counts().free;
        let removed = self.scheduler.remove(id).expect("it is live");
        assert_eq!(removed.blocks_freed, self.pool.counts().free - before, "the receipt tells the truth");
        assert_eq!(removed.completion_tokens, self.live.remove(&id).expect("it is live").output.len());
        assert!(self.scheduler.remove(id).is_none(), "a second abort finds nothing");
    }

    fn step(&mut self) {
        let plan = self.scheduler.plan();
        assert!(plan.rows.len() <= self.limits.max_num_seqs);
        assert!(plan.num_tokens() <= self.limits.max_num_batched_tokens);
        assert!(self.live.is_empty() || !plan.rows.is_empty(), "live requests, but nothing runs");
        self.scheduler.check();
        // Aborts arrive while the step runs.
        if self.rng.random_bool(0.1) {
            self.abort_someone();
            self.scheduler.check();
        }
        let output = self.runner.run(&plan);
        for effect in self.scheduler.resolve(&plan, output) {
            let Effect::Token { seq, token, finish, .. } = effect else { panic!("unexpected {effect:?}") };
            let live = self.live.get_mut(&seq).expect("a token for a request that is gone");
            live.output.push(token);
            if let Some((reason, _)) = finish {
                let live = self.live.remove(&seq).expect("read above");
                assert_eq!(live.output, live.alone(), "{seq:?} differs from the same request alone");
                assert_eq!(
                    reason == FinishReason::Stop,
                    live.output.last() == Some(&EOS) && live.output.len() >= live.sampling.min_tokens
                );
                self.finished += 1;
            }
        }
        self.scheduler.check();
    }

    fn run(mut self, steps: usize) -> (usize, u64) {
        for _ in 0..steps {
            if self.live.len() < 24 && self.rng.random_bool(0.4) {
                self.arrive();
            }
            if self.rng.random_bool(0.03) {
                self.abort_someone();
            }
            self.step();
        }
        // Everything that is left finishes: nobody starves.
        for _ in 0..100_000 {
            if self.live.is_empty() {
                break;
            }
            self.step();
        }
        assert!(self.live.is_empty(), "requests that fit alone must finish");
        let counts = self.pool.counts();
        assert_eq!(counts.free, counts.total, "blocks leaked");
        (self.finished, self.scheduler.num_preemptions())
    }
}

#[test]
fn every_request_gives_what_it_gives_alone_and_no_block_is_lost() {
    let (mut finished, mut preemptions) = (0, 0);
    for seed in 0..400 {
        let result = panic::catch_unwind(|| Sim::new(seed).run(250));
        let (f, p) =
            result.unwrap_or_else(|_| panic!("seed {seed} fails; replay it with Sim::new({seed}).run(250)"));
        finished += f;
        preemptions += p;
    }
    // The simulation is worth nothing when it does not reach the interesting states.
    assert!(finished > 10_000 && preemptions > 1_000, "finished {finished}, preemptions {preemptions}");
}

fn sequence(id: u64, prompt_len: usize, max_tokens: usize) -> NewSequence {
    NewSequence {
        id: SeqId(id),
        prompt: vec![TokenId(1); prompt_len].into(),
        sampling: Arc::new(Sampling { eos_token_ids: Vec::new(), ..sampling(max_tokens, 0) }),
        seed: id,
        prompt_of: None,
    }
}

fn scheduler(
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    blocks: usize,
) -> (Scheduler, SimRunner, BlockPool) {
    let pool = BlockPool::new(blocks, 4);
    let runner = SimRunner { block_size: 4, slots: vec![None; blocks * 4] };
    (Scheduler::new(Limits { max_num_seqs, max_num_batched_tokens }, pool.clone()), runner, pool)
}

#[test]
fn a_step_mixes_decode_rows_and_prompt_chunks_and_serves_decode_first() {
    let (mut scheduler, mut runner, _) = scheduler(4, 8, 64);
    scheduler.add(sequence(0, 3, 9));
    let plan = scheduler.plan();
    let output = runner.run(&plan);
    scheduler.resolve(&plan, output);
    scheduler.add(sequence(1, 20, 9));
    let plan = scheduler.plan();
    let shape: Vec<_> =
        plan.rows.iter().map(|row| (row.seq.0, row.tokens.len(), row.sample.is_some())).collect();
    assert_eq!(
        shape,
        [(0, 1, true), (1, 7, false)],
        "one decode row, then as much prompt as the budget leaves"
    );
}

#[test]
fn when_blocks_run_out_the_youngest_is_preempted_and_comes_back_first() {
    let (mut scheduler, mut runner, pool) = scheduler(3, 64, 6);
    (0..3).for_each(|id| scheduler.add(sequence(id, 8, 9)));
    let mut seen_queued = false;
    for _ in 0..60 {
        let plan = scheduler.plan();
        let output = runner.run(&plan);
        scheduler.resolve(&plan, output);
        scheduler.check();
        let preempted = |id| scheduler.get(SeqId(id)).map_or(0, |seq| seq.num_preemptions());
        assert_eq!(preempted(0), 0, "the oldest is never preempted");
        seen_queued |= preempted(2) > 0;
    }
    assert!(seen_queued, "six blocks cannot hold three sequences of five");
    assert_eq!(pool.counts().free, 6);
}

#[test]
fn completions_of_one_prompt_share_its_full_blocks() {
    let (mut scheduler, mut runner, pool) = scheduler(3, 64, 64);
    scheduler.add(sequence(0, 13, 9));
    (1..3).for_each(|id| scheduler.add(NewSequence { prompt_of: Some(SeqId(0)), ..sequence(id, 13, 9) }));
    let plan = scheduler.plan();
    assert_eq!(plan.rows.len(), 1, "the others wait for the prompt");
    let output = runner.run(&plan);
    scheduler.resolve(&plan, output);
    let plan = scheduler.plan();
    let starts: Vec<_> = plan.rows.iter().map(|row| (row.seq.0, row.start)).collect();
    assert_eq!(starts, [(0, 13), (1, 12), (2, 12)], "three full blocks of four are shared");
    assert_eq!(pool.counts().owned, 3 + 3, "the prompt's full blocks once, and one more for each");
}

#[test]
fn what_can_never_fit_is_known_at_admission() {
    let (scheduler, _, _) = scheduler(1, 8, 2);
    assert!(scheduler.fits(4, 5), "eight tokens are written: the ninth has no successor");
    assert!(!scheduler.fits(4, 6));
}
