//! The steps in flight, and what becomes of them when one fails.

use std::{
    collections::VecDeque,
    panic::{self, AssertUnwindSafe},
};

use super::{BlockCopy, DeviceLost, Runner, RunnerError, panic_message};
use crate::{
    ids::TokenId,
    planted::{Bug, planted},
    scheduler::{MAX_IN_FLIGHT, PlanRow, RowResult, StepOutput, StepPlan, TokenInput},
};

/// A runner and the steps in flight on it, at most [`MAX_IN_FLIGHT`].
///
/// A step that fails as a whole is repeated row by row, so that only the rows that fail alone are lost. The step behind it
/// was computed on tokens, keys and values that were never made: it is computed again, after the repetition. Results do not depend
/// on who shares a step, so the other rows get what they would have got.
///
/// A plan's blocks are copied right before it is launched. Its saves are made the first time only, as what was launched since may
/// have overwritten the blocks; so a plan saves nothing that a step in flight still writes, and may have to write again. Its loads are
/// made every time, as a row that is repeated for a request that is gone may have overwritten them. Every step is launched, or was
/// tried to be, before its turn comes: the copies of one whose rows are tried alone have been made.
pub struct StepQueue<R> {
    runner: R,
    /// Oldest first.
    steps: VecDeque<Step>,
    /// What the step that finished last sampled, per row of logits.
    sampled: Vec<Option<TokenId>>,
    /// That step was repeated row by row, so the runner does not have its tokens where a step behind it would look.
    repeated: bool,
}

struct Step {
    plan: StepPlan,
    state: State,
    /// Its saves were made.
    saved: bool,
}

enum State {
    /// In flight on the runner.
    Launched,
    /// Not on the runner, for this reason.
    Down(String),
}

/// What is put in for a token that its row failed to sample. Any token will do: the sequence ends there, and nobody reads what comes after.
const NO_TOKEN: TokenId = TokenId(0);

impl<R: Runner> StepQueue<R> {
    /// Nothing in flight.
    pub fn new(runner: R) -> Self {
        Self { runner, steps: VecDeque::new(), sampled: Vec::new(), repeated: false }
    }

    /// Whether no step is in flight.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Whether a step that is launched now runs behind another one, which is not done yet.
    pub fn can_overlap(&mut self) -> bool {
        match self.steps.front() {
            Some(Step { state: State::Launched, .. }) => {
                self.steps.len() < MAX_IN_FLIGHT && !self.runner.is_done()
            }
            _ => false,
        }
    }

    /// Launches a step. One that cannot be launched fails when its turn comes.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn launch(&mut self, plan: StepPlan) -> Result<(), DeviceLost> {
        assert!(self.steps.len() < MAX_IN_FLIGHT, "the engine keeps count");
        let state = State::Down("the step before it failed".into());
        let mut step = Step { plan, state, saved: false };
        if !matches!(self.steps.back(), Some(Step { state: State::Down(_), .. })) {
            self.try_launch(&mut step)?;
        }
        self.steps.push_back(step);
        Ok(())
    }

    fn try_launch(&mut self, step: &mut Step) -> Result<(), DeviceLost> {
        self.copy(step)?;
        let launched = if self.repeated {
            debug_assert!(self.steps.is_empty(), "a step that follows a repeated one is the only one");
            let plan = self.with_known_tokens(&step.plan.rows);
            self.attempt(|runner| runner.launch(&plan))
        } else {
            self.attempt(|runner| runner.launch(&step.plan))
        };
        step.state = match launched {
            Ok(()) => {
                self.repeated = false;
                State::Launched
            }
            Err(RunnerError::Step(error)) => State::Down(error),
            Err(RunnerError::DeviceLost(lost)) => return Err(lost),
        };
        Ok(())
    }

    /// Makes the copies that a launch of this step needs.
    fn copy(&mut self, step: &mut Step) -> Result<(), DeviceLost> {
        let again = step.saved;
        if !again {
            self.set_adapters(&step.plan)?;
        }
        let saves = if again && !planted(Bug::SavesRepeated) { &[] } else { step.plan.saves.as_slice() };
        let saves = saves.iter().map(|&(block, host)| BlockCopy::Save(block, host));
        let loads = if again && planted(Bug::LoadsNotRepeated) { &[] } else { step.plan.loads.as_slice() };
        let loads = loads.iter().map(|&(host, block)| BlockCopy::Load(host, block));
        let copies: Vec<_> = saves.chain(loads).collect();
        step.saved = true;
        if copies.is_empty() {
            return Ok(());
        }
        self.attempt(|runner| runner.copy(&copies)).map_err(|error| match error {
            RunnerError::DeviceLost(lost) => lost,
            // A panic, say: what the blocks hold is just as unknown.
            RunnerError::Step(error) => DeviceLost(format!("blocks could not be copied: {error}")),
        })
    }

    /// Puts the adapters that a plan brings into their slots: once, as nothing overwrites them but the adapters of a later plan.
    fn set_adapters(&mut self, plan: &StepPlan) -> Result<(), DeviceLost> {
        for (slot, adapter) in &plan.adapters {
            self.attempt(|runner| runner.set_adapter(*slot, adapter)).map_err(|error| match error {
                RunnerError::DeviceLost(lost) => lost,
                // What the slot holds is just as unknown.
                RunnerError::Step(error) => DeviceLost(format!("{adapter:?} has no place: {error}")),
            })?;
        }
        Ok(())
    }

    /// Waits for the oldest step and returns it with one result per row. At least one step is in flight.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn finish(&mut self) -> Result<(StepPlan, StepOutput), DeviceLost> {
        let Step { plan, state, .. } = self.steps.pop_front().expect("the engine waits for what it launched");
        let result = match state {
            State::Launched => self.attempt(Runner::wait),
            State::Down(error) => Err(RunnerError::Step(error)),
        };
        let output = match result {
            Ok(output) if output.rows.len() == plan.rows.len() => output,
            Ok(output) => {
                let error = format!("{} results for {} rows", output.rows.len(), plan.rows.len());
                return self.recover(plan, error);
            }
            Err(RunnerError::Step(error)) => return self.recover(plan, error),
            Err(RunnerError::DeviceLost(lost)) => return Err(lost),
        };
        self.sampled = sampled(&plan, &output);
        Ok((plan, output))
    }

    /// Repeats a failed step row by row, and launches the one behind it again.
    fn recover(&mut self, plan: StepPlan, error: String) -> Result<(StepPlan, StepOutput), DeviceLost> {
        let behind = self.steps.pop_front();
        if let Some(Step { state: State::Launched, .. }) = &behind
            && let Err(RunnerError::DeviceLost(lost)) = self.attempt(Runner::wait)
        {
            return Err(lost);
        }
        let rows = if plan.rows.len() == 1 {
            vec![RowResult::Failed(error)]
        } else {
            tracing::error!(rows = plan.rows.len(), error, "a step failed; running its rows one by one");
            plan.rows.iter().map(|row| self.alone(row)).collect::<Result<_, _>>()?
        };
        let output = StepOutput { rows };
        self.sampled = sampled(&plan, &output);
        self.repeated = true;
        if let Some(mut step) = behind {
            self.try_launch(&mut step)?;
            self.steps.push_back(step);
        }
        Ok((plan, output))
    }

    fn alone(&mut self, row: &PlanRow) -> Result<RowResult, DeviceLost> {
        let plan = self.with_known_tokens(std::slice::from_ref(row));
        let result = self.attempt(|runner| runner.launch(&plan)).and_then(|()| self.attempt(Runner::wait));
        match result {
            Ok(output) => Ok(output.rows.into_iter().next().unwrap_or(RowResult::Failed("no result".into()))),
            Err(RunnerError::Step(error)) => Ok(RowResult::Failed(error)),
            Err(RunnerError::DeviceLost(lost)) => Err(lost),
        }
    }

    /// A plan of these rows with the tokens in it that the step before sampled.
    fn with_known_tokens(&self, rows: &[PlanRow]) -> StepPlan {
        let token = |logits_row: u32| self.sampled.get(logits_row as usize).copied().flatten();
        let known = |row: &PlanRow| match row.input {
            TokenInput::Sampled(logits_row) => {
                let token = token(logits_row).unwrap_or(NO_TOKEN);
                PlanRow { input: TokenInput::Known(vec![token]), ..row.clone() }
            }
            TokenInput::Known(_) => row.clone(),
        };
        StepPlan { rows: rows.iter().map(known).collect(), ..StepPlan::default() }
    }

    fn attempt<T>(&mut self, call: impl FnOnce(&mut R) -> Result<T, RunnerError>) -> Result<T, RunnerError> {
        panic::catch_unwind(AssertUnwindSafe(|| call(&mut self.runner)))
            .unwrap_or_else(|payload| Err(RunnerError::Step(panic_message(payload.as_ref()))))
    }
}

/// What a step sampled, per row of its logits; `None` for scored positions and for rows that failed.
fn sampled(plan: &StepPlan, output: &StepOutput) -> Vec<Option<TokenId>> {
    let mut sampled = Vec::new();
    for (index, logits_row) in plan.samples() {
        sampled.resize(logits_row as usize + 1, None);
        if let RowResult::Done(row) = &output.rows[index] {
            sampled[logits_row as usize] = row.sampled;
        }
    }
    sampled
}
