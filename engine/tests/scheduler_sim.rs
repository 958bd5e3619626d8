//! The scheduler in a simulator: no kernels, no threads, no clock.
//!
//! The simulated model computes `next token = H(seed, all previous tokens)` and reads the previous tokens back through the
//! block table from simulated blocks, so keys and values that are lost, stale, duplicated or shared by mistake change the output. The
//! simulated device runs up to two steps behind the host and puts in the tokens that the host did not know. Steps fail, alone and in
//! company, and leave rubbish behind. After every turn everything that must hold is checked. A failing seed is printed and
//! replays.

#![allow(clippy::unwrap_used)]

use std::{
    cell::Cell,
    collections::{BTreeMap, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    panic,
    rc::Rc,
    sync::Arc,
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tidemill_engine::{
    ids::{BlockId, SeqId, TokenId},
    kv::BlockPool,
    output::{FinishReason, TokenLogprobs},
    runner::{Runner, RunnerError, StepQueue},
    sampling::Sampling,
    scheduler::{
        Effect, Limits, MAX_IN_FLIGHT, NewSequence, PlanRow, RowOutput, RowResult, SamplePlan, Scheduler,
        StepOutput, StepPlan, TokenInput,
    },
};

const VOCAB: u64 = 97;
const EOS: TokenId = TokenId(13);
/// What no healthy step writes or samples.
const RUBBISH: TokenId = TokenId(9999);

/// The simulated model's opinion on what follows. It counts on what the host says about the output so far.
fn next_token(seed: u64, previous: &[TokenId], counts: &[(TokenId, u32)], forbid_stops: bool) -> TokenId {
    let mut hasher = DefaultHasher::new();
    (seed, previous, counts, forbid_stops).hash(&mut hasher);
    TokenId((hasher.finish() % VOCAB) as u32)
}

/// What goes wrong with a sequence, once a row reaches so many tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Healthy,
    /// Every step with such a row fails as a whole.
    Poison(usize),
    /// The row's logits are not finite.
    NotFinite(usize),
}

fn fate(seed: u64) -> Fate {
    let tokens = 3 + (seed % 47) as usize;
    match seed % 23 {
        7 => Fate::Poison(tokens),
        11 => Fate::NotFinite(tokens),
        _ => Fate::Healthy,
    }
}

/// Simulated keys and values, and a queue of steps.
struct Device {
    rng: StdRng,
    block_size: usize,
    /// What was written to each slot.
    slots: Vec<TokenId>,
    /// What the last step sampled, per row of its logits.
    sampled: Vec<TokenId>,
    queue: VecDeque<StepPlan>,
    done: VecDeque<Result<StepOutput, RunnerError>>,
    /// How often a step of several rows fails for no reason of theirs.
    flakiness: f64,
    failures: Rc<Cell<usize>>,
}

impl Device {
    fn new(seed: u64, blocks: usize, block_size: usize, flakiness: f64) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed ^ 0xDE51CE),
            block_size,
            slots: vec![RUBBISH; blocks * block_size],
            sampled: Vec::new(),
            queue: VecDeque::new(),
            done: VecDeque::new(),
            flakiness,
            failures: Rc::default(),
        }
    }

    fn slot(&self, blocks: &[BlockId], position: usize) -> usize {
        blocks[position / self.block_size].0 as usize * self.block_size + position % self.block_size
    }

    /// Whether a step fails that is not to blame. A row alone never does.
    fn hiccup(&mut self, plan: &StepPlan) -> bool {
        plan.rows.len() > 1 && self.rng.random_bool(self.flakiness)
    }

    fn execute_next(&mut self) {
        let Some(plan) = self.queue.pop_front() else { return };
        let poisoned =
            |row: &PlanRow| matches!(fate(seed_of(row)), Fate::Poison(tokens) if row.end() >= tokens);
        let fails = plan.rows.iter().any(poisoned) || self.hiccup(&plan);
        let inputs: Vec<Vec<TokenId>> = plan.rows.iter().map(|row| self.input(row)).collect();
        for (row, tokens) in plan.rows.iter().zip(inputs) {
            for (position, token) in (row.start..).zip(tokens) {
                let slot = self.slot(&row.blocks, position);
                self.slots[slot] = if fails { RUBBISH } else { token };
            }
        }
        self.sampled.clear();
        let rows = plan.rows.iter().map(|row| self.result(row, fails)).collect();
        self.failures.update(|n| n + usize::from(fails));
        self.done.push_back(if fails {
            Err(RunnerError::Step("failed".into()))
        } else {
            Ok(StepOutput { rows })
        });
    }

    fn input(&self, row: &PlanRow) -> Vec<TokenId> {
        match &row.input {
            TokenInput::Known(tokens) => tokens.clone(),
            // Behind a step that failed to launch there may be none.
            &TokenInput::Sampled(row) => vec![self.sampled.get(row as usize).copied().unwrap_or(RUBBISH)],
        }
    }

    fn result(&mut self, row: &PlanRow, fails: bool) -> RowResult {
        self.sampled.extend(row.targets.iter().map(|_| RUBBISH));
        let scored = |&token: &TokenId| TokenLogprobs { token, logprob: 0.0, rank: 1, top: Vec::new() };
        let mut output = RowOutput {
            sampled: None,
            logprobs: None,
            prompt_logprobs: row.targets.iter().map(scored).collect(),
        };
        let Some(sample) = &row.sample else { return RowResult::Done(output) };
        let broken = matches!(fate(sample.seed), Fate::NotFinite(tokens) if row.end() >= tokens);
        if fails || broken {
            self.sampled.push(RUBBISH);
            return RowResult::NotFinite;
        }
        let token = self.choose(row, sample);
        self.sampled.push(token);
        output.sampled = Some(token);
        RowResult::Done(output)
    }

    fn choose(&self, row: &PlanRow, sample: &SamplePlan) -> TokenId {
        let read = |position| self.slots[self.slot(&row.blocks, position)];
        let previous: Vec<TokenId> = (0..sample.position).map(read).collect();
        next_token(sample.seed, &previous, &sample.token_counts, sample.forbid_stops)
    }
}

/// The simulation gives each sequence its id as its seed.
fn seed_of(row: &PlanRow) -> u64 {
    row.seq.0
}

impl Runner for Device {
    fn launch(&mut self, plan: &StepPlan) -> Result<(), RunnerError> {
        if self.hiccup(plan) {
            self.failures.update(|n| n + 1);
            return Err(RunnerError::Step("no launch".into()));
        }
        self.queue.push_back(plan.clone());
        if self.rng.random_bool(0.5) {
            self.execute_next();
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<StepOutput, RunnerError> {
        while self.done.is_empty() {
            self.execute_next();
        }
        self.done.pop_front().unwrap()
    }

    fn is_done(&mut self) -> bool {
        !self.done.is_empty()
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

/// How a request ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Finished(FinishReason),
    Broken(Fate),
}

/// A live request of the simulation.
struct Live {
    prompt: Arc<[TokenId]>,
    sampling: Arc<Sampling>,
    seed: u64,
    output: Vec<TokenId>,
    scored: Vec<TokenId>,
    /// It has had a row of a step.
    started: bool,
    /// Launches in a row that left it out although it was the oldest.
    left_out: usize,
}

impl Live {
    /// What the request gives when it runs alone. End-of-sequence tokens before `min_tokens` do not end it here either: the
    /// simulated model cannot be forbidden to choose them.
    fn alone(&self) -> (Vec<TokenId>, End) {
        let mut tokens = self.prompt.to_vec();
        let end = loop {
            let fate = fate(self.seed);
            if matches!(fate, Fate::Poison(limit) | Fate::NotFinite(limit) if tokens.len() >= limit) {
                break End::Broken(fate);
            }
            let output = &tokens[self.prompt.len()..];
            let mut counts = BTreeMap::new();
            if self.sampling.has_penalties() {
                counts.extend(self.prompt.iter().map(|&token| (token, 0)));
                output.iter().for_each(|&token| *counts.entry(token).or_insert(0) += 1);
            }
            let counts: Vec<_> = counts.into_iter().collect();
            let forbid = output.len() < self.sampling.min_tokens;
            tokens.push(next_token(self.seed, &tokens, &counts, forbid));
            let output = &tokens[self.prompt.len()..];
            if output.len() >= self.sampling.min_tokens && output.last() == Some(&EOS) {
                break End::Finished(FinishReason::Stop);
            }
            if output.len() == self.sampling.max_tokens {
                break End::Finished(FinishReason::Length);
            }
        };
        (tokens.split_off(self.prompt.len()), end)
    }
}

/// How often the simulation came by the states that matter.
#[derive(Debug, Default)]
struct Seen {
    finished: usize,
    broken: usize,
    preemptions: u64,
    fed_back: usize,
    aborts_over_two_steps: usize,
    failed_steps: usize,
    /// Plans that left a row out for want of a block, behind a step in flight.
    shortages: usize,
    /// Rows that came too late: their sequence had ended.
    late_rows: usize,
}

struct Sim {
    rng: StdRng,
    limits: Limits,
    depth: usize,
    pool: BlockPool,
    scheduler: Scheduler,
    steps: StepQueue<Device>,
    live: BTreeMap<SeqId, Live>,
    next_id: u64,
    failures: Rc<Cell<usize>>,
    seen: Seen,
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
        let flakiness = if rng.random_bool(0.3) { 0.1 } else { 0.0 };
        let device = Device::new(seed, blocks, block_size, flakiness);
        Self {
            scheduler: Scheduler::new(limits, pool.clone()),
            failures: device.failures.clone(),
            steps: StepQueue::new(device),
            depth: if rng.random_bool(0.15) { 1 } else { MAX_IN_FLIGHT },
            rng,
            limits,
            pool,
            live: BTreeMap::new(),
            next_id: 0,
            seen: Seen::default(),
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
        let mut sampling = sampling(max_tokens, min_tokens);
        sampling.presence_penalty = if self.rng.random_bool(0.2) { 0.5 } else { 0.0 };
        sampling.prompt_logprobs = self.rng.random_bool(0.2).then_some(0);
        let first = SeqId(self.next_id);
        for _ in 0..self.rng.random_range(1..=3) {
            let id = SeqId(self.next_id);
            self.next_id += 1;
            let prompt_of = (id != first).then_some(first);
            // The first completion reports the prompt.
            let prompt_logprobs = sampling.prompt_logprobs.filter(|_| prompt_of.is_none());
            let sampling = Arc::new(Sampling { prompt_logprobs, ..sampling.clone() });
            let new =
                NewSequence { id, prompt: prompt.clone(), sampling: sampling.clone(), seed: id.0, prompt_of };
            self.scheduler.add(new);
            let live = Live {
                prompt: prompt.clone(),
                sampling,
                seed: id.0,
                output: Vec::new(),
                scored: Vec::new(),
                started: false,
                left_out: 0,
            };
            self.live.insert(id, live);
        }
    }

    fn abort_someone(&mut self) {
        let pick = self.rng.random_range(0..self.live.len().max(1));
        let Some(&id) = self.live.keys().nth(pick) else { return };
        self.seen.aborts_over_two_steps += usize::from(self.scheduler.num_in_flight() == MAX_IN_FLIGHT);
        let before = self.pool.counts().free;
        let removed = self.scheduler.remove(id).expect("it is live");
        assert_eq!(removed.blocks_freed, self.pool.counts().free - before, "the receipt tells the truth");
        assert_eq!(removed.completion_tokens, self.live.remove(&id).expect("it is live").output.len());
        assert!(self.scheduler.remove(id).is_none(), "a second abort finds nothing");
        self.scheduler.check();
    }

    /// Plans a step or takes one's results, whatever is possible, by chance where both are.
    fn turn(&mut self) {
        let in_flight = self.scheduler.num_in_flight();
        let launch = in_flight == 0 || (in_flight < self.depth && self.rng.random_bool(0.7));
        if !(launch && self.launch()) && in_flight > 0 {
            self.resolve();
        }
        self.scheduler.check();
    }

    /// False when nothing can be planned now.
    fn launch(&mut self) -> bool {
        let (in_flight, preemptions) = (self.scheduler.num_in_flight(), self.scheduler.num_preemptions());
        let plan = self.scheduler.plan();
        self.check_plan(&plan);
        assert!(in_flight == 0 || preemptions == self.scheduler.num_preemptions(), "preempted in flight");
        if plan.rows.is_empty() {
            assert!(in_flight > 0 || self.live.is_empty(), "live requests, but nothing runs");
            self.seen.shortages += usize::from(in_flight > 0 && self.pool.counts().free == 0);
            return false;
        }
        let fed_back = |row: &&PlanRow| matches!(row.input, TokenInput::Sampled(_));
        self.seen.fed_back += plan.rows.iter().filter(fed_back).count();
        self.steps.launch(plan).unwrap();
        true
    }

    fn check_plan(&mut self, plan: &StepPlan) {
        assert!(plan.rows.len() <= self.limits.max_num_seqs);
        assert!(plan.num_tokens() <= self.limits.max_num_batched_tokens);
        for (at, row) in plan.rows.iter().enumerate() {
            let live = self.live.get(&row.seq).expect("a plan for a request that is gone");
            assert!(row.input.num_tokens() > 0 && !plan.rows[..at].iter().any(|other| other.seq == row.seq));
            assert!(row.end() < live.prompt.len() + live.sampling.max_tokens, "computed past its last token");
        }
        // One that never had a row may wait for a prompt, and a prompt for what decode rows leave of the budget.
        if let Some((id, live)) = self.live.iter_mut().find(|(_, live)| live.started) {
            let spare = !plan.rows.is_empty() && plan.num_tokens() < self.limits.max_num_batched_tokens;
            let has_row = plan.rows.iter().any(|row| row.seq == *id);
            live.left_out = if has_row { 0 } else { live.left_out + usize::from(spare) };
            assert!(live.left_out <= 2, "the oldest does not advance");
        }
        plan.rows.iter().for_each(|row| self.live(row.seq).started = true);
    }

    fn resolve(&mut self) {
        let (plan, output) = self.steps.finish().unwrap();
        self.seen.late_rows += plan.rows.iter().filter(|row| !self.live.contains_key(&row.seq)).count();
        for effect in self.scheduler.resolve(&plan, output) {
            match effect {
                Effect::Token { seq, token, finish, .. } => {
                    self.live(seq).output.push(token);
                    if let Some((reason, _)) = finish {
                        self.end(seq, End::Finished(reason));
                        self.seen.finished += 1;
                    }
                }
                Effect::PromptLogprobs { seq, logprobs } => {
                    self.live(seq).scored.extend(logprobs.iter().map(|scored| scored.token));
                }
                Effect::Failed { seq, error, .. } => {
                    let fate = fate(seq.0);
                    assert_eq!(matches!(fate, Fate::NotFinite(_)), error.is_none(), "{seq:?}: {error:?}");
                    self.end(seq, End::Broken(fate));
                    self.seen.broken += 1;
                }
            }
        }
    }

    fn live(&mut self, seq: SeqId) -> &mut Live {
        self.live.get_mut(&seq).expect("an effect on a request that is gone")
    }

    fn end(&mut self, seq: SeqId, end: End) {
        let live = self.live.remove(&seq).expect("it was live");
        assert_eq!((live.output.clone(), end), live.alone(), "{seq:?} differs from the same request alone");
        if live.sampling.prompt_logprobs.is_some() && !live.output.is_empty() {
            assert_eq!(live.scored, live.prompt[1..], "each prompt token is scored once");
        }
    }

    fn run(mut self, turns: usize) -> Seen {
        for _ in 0..turns {
            if self.live.len() < 24 && self.rng.random_bool(0.25) {
                self.arrive();
            }
            if self.rng.random_bool(0.05) {
                self.abort_someone();
            }
            self.turn();
        }
        // Everything that is left finishes: nobody starves.
        for _ in 0..100_000 {
            if self.live.is_empty() && self.scheduler.num_in_flight() == 0 {
                break;
            }
            self.turn();
        }
        assert!(self.live.is_empty(), "requests that fit alone must finish");
        let counts = self.pool.counts();
        assert_eq!(counts.free, counts.total, "blocks leaked");
        self.seen.preemptions = self.scheduler.num_preemptions();
        self.seen.failed_steps = self.failures.get();
        self.seen
    }
}

#[test]
fn every_request_gives_what_it_gives_alone_and_no_block_is_lost() {
    let mut all = Seen::default();
    for seed in 0..1000 {
        let result = panic::catch_unwind(|| Sim::new(seed).run(500));
        let seen =
            result.unwrap_or_else(|_| panic!("seed {seed} fails; replay it with Sim::new({seed}).run(500)"));
        all.finished += seen.finished;
        all.broken += seen.broken;
        all.preemptions += seen.preemptions;
        all.fed_back += seen.fed_back;
        all.aborts_over_two_steps += seen.aborts_over_two_steps;
        all.failed_steps += seen.failed_steps;
        all.shortages += seen.shortages;
        all.late_rows += seen.late_rows;
    }
    // The simulation is worth nothing when it does not reach the interesting states.
    let enough = all.finished > 10_000
        && all.broken > 500
        && all.preemptions > 1_000
        && all.fed_back > 50_000
        && all.aborts_over_two_steps > 500
        && all.failed_steps > 1_000
        && all.shortages > 500
        && all.late_rows > 1_000;
    assert!(enough, "{all:?}");
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

/// A scheduler, a device and a pool of blocks of four.
fn scheduler(
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    blocks: usize,
) -> (Scheduler, StepQueue<Device>, BlockPool) {
    let pool = BlockPool::new(blocks, 4);
    let steps = StepQueue::new(Device::new(0, blocks, 4, 0.0));
    (Scheduler::new(Limits { max_num_seqs, max_num_batched_tokens }, pool.clone()), steps, pool)
}

/// Plans a step and launches it.
fn launch(scheduler: &mut Scheduler, steps: &mut StepQueue<Device>) -> StepPlan {
    let plan = scheduler.plan();
    if !plan.rows.is_empty() {
        steps.launch(plan.clone()).unwrap();
    }
    scheduler.check();
    plan
}

fn finish(scheduler: &mut Scheduler, steps: &mut StepQueue<Device>) {
    let (plan, output) = steps.finish().unwrap();
    scheduler.resolve(&plan, output);
    scheduler.check();
}

/// Sequence, first position and number of tokens of each row.
fn shape(plan: &StepPlan) -> Vec<(u64, usize, usize)> {
    plan.rows.iter().map(|row| (row.seq.0, row.start, row.input.num_tokens())).collect()
}

#[test]
fn a_step_mixes_decode_rows_and_prompt_chunks_and_serves_decode_first() {
    let (mut scheduler, mut steps, _) = scheduler(4, 8, 64);
    scheduler.add(sequence(0, 3, 9));
    launch(&mut scheduler, &mut steps);
    scheduler.add(sequence(1, 20, 9));
    let plan = launch(&mut scheduler, &mut steps);
    assert_eq!(
        shape(&plan),
        [(0, 3, 1), (1, 0, 7)],
        "a decode row, then as much prompt as the budget leaves"
    );
    assert_eq!(plan.rows[0].input, TokenInput::Sampled(0));
    assert!(plan.rows[0].sample.is_some() && plan.rows[1].sample.is_none());
}

#[test]
fn the_token_of_a_row_is_found_among_all_rows_of_logits() {
    let (mut scheduler, mut steps, _) = scheduler(4, 64, 64);
    let scoring = |id| {
        let new = sequence(id, 3, 9);
        NewSequence {
            sampling: Arc::new(Sampling { prompt_logprobs: Some(0), ..(*new.sampling).clone() }),
            ..new
        }
    };
    scheduler.add(scoring(0));
    scheduler.add(sequence(1, 3, 9));
    scheduler.add(scoring(2));
    let plan = launch(&mut scheduler, &mut steps);
    assert_eq!(
        plan.samples().collect::<Vec<_>>(),
        [(0, 2), (1, 3), (2, 6)],
        "two scored positions before a sample"
    );
    let plan = launch(&mut scheduler, &mut steps);
    let inputs: Vec<_> = plan.rows.iter().map(|row| row.input.clone()).collect();
    assert_eq!(inputs, [2, 3, 6].map(TokenInput::Sampled));
}

#[test]
fn a_prompt_goes_on_behind_its_own_chunk_in_flight() {
    let (mut scheduler, mut steps, _) = scheduler(4, 8, 64);
    scheduler.add(sequence(0, 20, 2));
    let mut chunks = vec![launch(&mut scheduler, &mut steps)];
    while scheduler.num_in_flight() > 0 {
        chunks.push(launch(&mut scheduler, &mut steps));
        finish(&mut scheduler, &mut steps);
    }
    let chunks: Vec<_> = chunks.iter().flat_map(shape).collect();
    assert_eq!(chunks, [(0, 0, 8), (0, 8, 8), (0, 16, 4), (0, 20, 1)], "and nothing after the last token");
    assert!(scheduler.get(SeqId(0)).is_none());
}

#[test]
fn when_blocks_run_out_the_youngest_is_preempted_and_comes_back_first() {
    let (mut scheduler, mut steps, pool) = scheduler(3, 64, 6);
    (0..3).for_each(|id| scheduler.add(sequence(id, 8, 9)));
    let mut seen_queued = false;
    for _ in 0..60 {
        while scheduler.num_in_flight() < MAX_IN_FLIGHT && !launch(&mut scheduler, &mut steps).rows.is_empty()
        {
        }
        if scheduler.num_in_flight() > 0 {
            finish(&mut scheduler, &mut steps);
        }
        let preempted = |id| scheduler.get(SeqId(id)).map_or(0, |seq| seq.num_preemptions());
        assert_eq!(preempted(0), 0, "the oldest is never preempted");
        seen_queued |= preempted(2) > 0;
    }
    assert!(seen_queued, "six blocks cannot hold three sequences of five");
    assert_eq!(pool.counts().free, 6);
}

#[test]
fn a_shortage_behind_a_step_in_flight_preempts_nobody_until_nothing_is_in_flight() {
    let (mut scheduler, mut steps, _) = scheduler(3, 64, 4);
    // Two blocks each: the third is needed for position 8.
    (0..2).for_each(|id| scheduler.add(sequence(id, 7 - id as usize, 9)));
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 0, 7), (1, 0, 6)]);
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 7, 1), (1, 6, 1)]);
    finish(&mut scheduler, &mut steps);
    assert_eq!(
        shape(&launch(&mut scheduler, &mut steps)),
        [(1, 7, 1)],
        "no block for the older, none needed here"
    );
    finish(&mut scheduler, &mut steps);
    assert!(launch(&mut scheduler, &mut steps).rows.is_empty(), "the older is not left out twice");
    assert_eq!(scheduler.num_preemptions(), 0);
    finish(&mut scheduler, &mut steps);
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 8, 1)]);
    assert_eq!(scheduler.num_preemptions(), 1);
}

#[test]
fn in_a_shortage_behind_a_step_in_flight_nobody_is_admitted() {
    let (mut scheduler, mut steps, pool) = scheduler(3, 8, 4);
    scheduler.add(sequence(0, 5, 9));
    scheduler.add(sequence(1, 11, 2));
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 0, 5), (1, 0, 3)]);
    scheduler.add(sequence(2, 3, 2));
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 5, 1)], "seven tokens need two more blocks");
    assert_eq!(pool.counts().free, 1, "the newcomer would take what the prompt needs");
}

#[test]
fn completions_of_one_prompt_share_its_full_blocks() {
    let (mut scheduler, mut steps, pool) = scheduler(3, 64, 64);
    scheduler.add(sequence(0, 13, 9));
    (1..3).for_each(|id| scheduler.add(NewSequence { prompt_of: Some(SeqId(0)), ..sequence(id, 13, 9) }));
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 0, 13)], "the others wait for the prompt");
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 13, 1)], "in flight is not enough");
    finish(&mut scheduler, &mut steps);
    let plan = launch(&mut scheduler, &mut steps);
    assert_eq!(shape(&plan), [(0, 14, 1), (1, 12, 1), (2, 12, 1)], "three full blocks of four are shared");
    assert_eq!(pool.counts().owned, 3 + 3, "the prompt's full blocks once, and one more for each");
}

#[test]
fn what_can_never_fit_is_known_at_admission() {
    let (scheduler, _, _) = scheduler(1, 8, 2);
    assert!(scheduler.fits(4, 5), "eight tokens are written: the ninth has no successor");
    assert!(!scheduler.fits(4, 6));
}
