//! Running a step: the device side of the engine.
//!
//! A [`Runner`] computes plans, one after the other, on a thread of its own ([`RunnerThread`]), so that the engine thread handles
//! commands while a step runs. [`DecoderRunner`] is the real one; tests bring their own.

mod decoder_runner;

use std::{
    panic::{self, AssertUnwindSafe},
    thread,
};

use crossbeam_channel::{Receiver, Sender, bounded};
pub use decoder_runner::DecoderRunner;

use crate::{
    error::LoadError,
    scheduler::{PlanRow, RowResult, StepOutput, StepPlan},
};

/// Computes steps.
pub trait Runner {
    /// Computes a plan and returns one result per row.
    ///
    /// # Errors
    /// When the step as a whole failed; the rows are then tried one by one. A panic counts as the same.
    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput, String>;
}

impl<R: Runner + ?Sized> Runner for Box<R> {
    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput, String> {
        (**self).run(plan)
    }
}

/// A runner on its own thread. Takes one plan at a time.
#[derive(Debug)]
pub struct RunnerThread {
    plans: Option<Sender<StepPlan>>,
    results: Receiver<(StepPlan, StepOutput)>,
    thread: Option<thread::JoinHandle<()>>,
}

impl RunnerThread {
    /// Starts the thread and builds the runner on it: what it allocates and the threads it starts belong there.
    /// `build` also returns what the caller wants to know about it.
    ///
    /// # Errors
    /// What `build` returned.
    pub fn start<R: Runner, I: Send + 'static>(
        build: impl FnOnce() -> Result<(R, I), LoadError> + Send + 'static,
    ) -> Result<(Self, I), LoadError> {
        let (plan_tx, plan_rx) = bounded::<StepPlan>(1);
        let (result_tx, result_rx) = bounded(1);
        let (ready_tx, ready_rx) = bounded(1);
        let body = move || match build() {
            Ok((mut runner, info)) => {
                if ready_tx.send(Ok(info)).is_err() {
                    return;
                }
                for plan in plan_rx {
                    let output = run_contained(&mut runner, &plan);
                    if result_tx.send((plan, output)).is_err() {
                        return;
                    }
                }
            }
            // Nobody waits any more when this fails: the start was given up.
            Err(error) => drop(ready_tx.send(Err(error))),
        };
        let thread = thread::Builder::new().name("tidemill-runner".into()).spawn(body).map_err(|source| {
            LoadError::Option { option: "runner thread", detail: format!("cannot be started: {source}") }
        })?;
        let info = ready_rx.recv().unwrap_or_else(|_| {
            Err(LoadError::Option { option: "model", detail: "loading panicked; see the log".into() })
        })?;
        Ok((Self { plans: Some(plan_tx), results: result_rx, thread: Some(thread) }, info))
    }

    /// Hands a step to the runner and returns at once. False when the runner is gone.
    #[must_use]
    pub fn launch(&self, plan: StepPlan) -> bool {
        self.plans.as_ref().is_some_and(|plans| plans.send(plan).is_ok())
    }

    /// Where each launched plan comes back with its results. Closed when the runner is gone.
    pub fn results(&self) -> &Receiver<(StepPlan, StepOutput)> {
        &self.results
    }
}

impl Drop for RunnerThread {
    fn drop(&mut self) {
        self.plans = None;
        if let Some(thread) = self.thread.take() {
            // A step in flight ends first; its result is dropped with the channel. A panic was reported when it happened.
            drop(thread.join());
        }
    }
}

/// Runs a plan; when that fails, runs its rows one by one, so that only the rows that fail alone are lost. Results do
/// not depend on who shares a step, so the others get what they would have got.
fn run_contained(runner: &mut impl Runner, plan: &StepPlan) -> StepOutput {
    let mut attempt = |plan: &StepPlan| {
        panic::catch_unwind(AssertUnwindSafe(|| runner.run(plan)))
            .unwrap_or_else(|payload| Err(panic_message(payload.as_ref())))
    };
    match attempt(plan) {
        Ok(output) => output,
        Err(error) if plan.rows.len() == 1 => StepOutput { rows: vec![RowResult::Failed(error)] },
        Err(error) => {
            tracing::error!(rows = plan.rows.len(), error, "a step failed; running its rows one by one");
            let alone = |row: &PlanRow| match attempt(&StepPlan { rows: vec![row.clone()] }) {
                Ok(output) => output.rows.into_iter().next().unwrap_or(RowResult::Failed("no result".into())),
                Err(error) => RowResult::Failed(error),
            };
            StepOutput { rows: plan.rows.iter().map(alone).collect() }
        }
    }
}

/// What a panic said.
pub(crate) fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic").to_owned()
}
