//! Random requests, aborts and failures, and what must hold after every turn.

use std::{cell::Cell, collections::BTreeMap, rc::Rc, sync::Arc};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tidemill_engine::{
    ids::{SeqId, TokenId},
    kv::BlockPool,
    output::FinishReason,
    runner::StepQueue,
    sampling::Sampling,
    scheduler::{Effect, Limits, MAX_IN_FLIGHT, NewSequence, PlanRow, Scheduler, StepPlan, TokenInput},
};

use crate::{
    device::{Device, EOS, Fate, VOCAB, fate, next_token},
    sampling,
};

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
pub struct Seen {
    pub finished: usize,
    pub broken: usize,
    pub preemptions: u64,
    pub fed_back: usize,
    pub aborts_over_two_steps: usize,
    pub failed_steps: usize,
    /// Plans that left a row out for want of a block, behind a step in flight.
    pub shortages: usize,
    /// Rows that came too late: their sequence had ended.
    pub late_rows: usize,
}

pub struct Sim {
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
    /// Everything about it follows from the seed.
    pub fn new(seed: u64) -> Self {
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

    /// So many turns, and then until nothing is left.
    pub fn run(mut self, turns: usize) -> Seen {
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
