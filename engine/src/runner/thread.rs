//! A runner on a thread of its own.

use std::{any::Any, thread};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::{DeviceLost, Runner, StepQueue};
use crate::{
    error::LoadError,
    scheduler::{StepOutput, StepPlan},
};

/// A step with its results, or the end of the device.
pub type Finished = Result<(StepPlan, StepOutput), DeviceLost>;

/// What the engine thread asks for.
enum Order {
    Step(StepPlan),
    /// Nothing is to run behind the step in flight: wait for that.
    Wait,
}

/// A runner on its own thread.
///
/// While a step runs, the engine plans the one behind it. The thread must not wait for the first when the second is about to come, nor
/// for a second that does not come; so it is told: whenever one step is in flight, the engine either
/// [launches](Self::launch) another or [says](Self::no_more) that there is none.
#[derive(Debug)]
pub struct RunnerThread {
    orders: Option<Sender<Order>>,
    results: Receiver<Finished>,
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
        // Bounded by the protocol: the engine keeps few steps in flight, and says at most once per step that no more come.
        let (order_tx, order_rx) = unbounded();
        let (result_tx, result_rx) = unbounded();
        let (ready_tx, ready_rx) = bounded(1);
        let body = move || match build() {
            Ok((runner, info)) => {
                if ready_tx.send(Ok(info)).is_ok() {
                    run(&mut StepQueue::new(runner), &order_rx, &result_tx);
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
        Ok((Self { orders: Some(order_tx), results: result_rx, thread: Some(thread) }, info))
    }

    /// Hands a step to the runner and returns at once. A runner that is gone shows in [`results`](Self::results).
    pub fn launch(&self, plan: StepPlan) {
        self.order(Order::Step(plan));
    }

    /// Says that nothing is to run behind the step in flight for now. A step that is launched later after all waits for its end.
    pub fn no_more(&self) {
        self.order(Order::Wait);
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // Fails only when the thread has ended, which closes the results too.
            drop(orders.send(order));
        }
    }

    /// Where each launched plan comes back with its results, in order. Closed when the runner is gone, after a device that
    /// was lost has been reported.
    pub fn results(&self) -> &Receiver<Finished> {
        &self.results
    }
}

impl Drop for RunnerThread {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // What is being computed ends first; its result is dropped with the channel. A panic was reported when it happened.
            drop(thread.join());
        }
    }
}

/// Launches and finishes steps until one side of the channels closes or the device is lost.
fn run<R: Runner>(steps: &mut StepQueue<R>, orders: &Receiver<Order>, results: &Sender<Finished>) {
    loop {
        let listen = steps.is_empty() || steps.can_overlap();
        let finished = match listen.then(|| orders.recv()) {
            Some(Err(_)) => return,
            Some(Ok(Order::Step(plan))) => match steps.launch(plan) {
                Ok(()) => continue,
                Err(lost) => Err(lost),
            },
            Some(Ok(Order::Wait)) if steps.is_empty() => continue,
            Some(Ok(Order::Wait)) | None => steps.finish(),
        };
        let lost = finished.is_err();
        if results.send(finished).is_err() || lost {
            return;
        }
    }
}

/// What a panic said.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic").to_owned()
}
