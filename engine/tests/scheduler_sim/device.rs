//! The simulated device and the simulated model on it.

use std::{
    cell::Cell,
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
    rc::Rc,
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tidemill_engine::{
    ids::{BlockId, TokenId},
    output::TokenLogprobs,
    runner::{Runner, RunnerError},
    scheduler::{PlanRow, RowOutput, RowResult, SamplePlan, StepOutput, StepPlan, TokenInput},
};

pub const VOCAB: u64 = 97;
pub const EOS: TokenId = TokenId(13);
/// What no healthy step writes or samples.
const RUBBISH: TokenId = TokenId(9999);

/// The simulated model's opinion on what follows. It counts on what the host says about the output so far.
pub fn next_token(seed: u64, previous: &[TokenId], counts: &[(TokenId, u32)], forbid_stops: bool) -> TokenId {
    let mut hasher = DefaultHasher::new();
    (seed, previous, counts, forbid_stops).hash(&mut hasher);
    TokenId((hasher.finish() % VOCAB) as u32)
}

/// What goes wrong with a sequence, once a row reaches so many tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fate {
    Healthy,
    /// Every step with such a row fails as a whole.
    Poison(usize),
    /// The row's logits are not finite.
    NotFinite(usize),
}

pub fn fate(seed: u64) -> Fate {
    let tokens = 3 + (seed % 47) as usize;
    match seed % 23 {
        7 => Fate::Poison(tokens),
        11 => Fate::NotFinite(tokens),
        _ => Fate::Healthy,
    }
}

/// Simulated keys and values, and a queue of steps.
pub struct Device {
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
    /// How many steps have failed.
    pub failures: Rc<Cell<usize>>,
}

impl Device {
    pub fn new(seed: u64, blocks: usize, block_size: usize, flakiness: f64) -> Self {
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
