//! Running steps: the device side of the engine.
//!
//! A [`Runner`] computes plans in order on a thread of its own ([`RunnerThread`]), so that the engine thread handles commands and
//! plans the next step while one runs. [`StepQueue`] keeps the steps in flight and contains their failures. [`DecoderRunner`] is the
//! real runner; tests bring their own.

mod decoder_runner;
mod queue;
mod thread;

pub use decoder_runner::DecoderRunner;
pub use queue::StepQueue;
pub(crate) use thread::panic_message;
pub use thread::{Finished, RunnerThread};
use tidemill_kernels::KernelError;

use crate::{
    adapter::{Adapter, AdapterSlot},
    ids::{BlockId, HostBlockId},
    scheduler::{StepOutput, StepPlan},
};

/// A block's keys and values, to be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockCopy {
    /// To the host.
    Save(BlockId, HostBlockId),
    /// Back into a block.
    Load(HostBlockId, BlockId),
}

/// Computes steps, in the order in which they were launched. It may be dropped with steps in flight.
pub trait Runner {
    /// Queues a step behind those in flight and returns; a runner without a queue of its own computes it here. A plan's
    /// [`TokenInput::Sampled`](crate::scheduler::TokenInput) means what the last launched step samples. Its saves and loads
    /// are not made here: [`StepQueue`] has them [copied](Self::copy).
    ///
    /// # Errors
    /// The step is then not in flight. A panic counts as [`RunnerError::Step`].
    fn launch(&mut self, plan: &StepPlan) -> Result<(), RunnerError>;

    /// Waits for the oldest step in flight and returns one result per row. In every case that step is no longer in flight.
    ///
    /// # Errors
    /// When the step as a whole failed; its rows are then tried one by one. A panic counts as [`RunnerError::Step`].
    fn wait(&mut self) -> Result<StepOutput, RunnerError>;

    /// Whether the oldest step in flight is done, so that [`wait`](Self::wait) returns at once. Its results then go out before
    /// another step is launched.
    fn is_done(&mut self) -> bool;

    /// Puts an adapter into a slot, behind the steps in flight and before those that are launched later. A runner without slots is never asked.
    ///
    /// # Errors
    /// [`RunnerError::DeviceLost`] always: nobody knows what the slot holds.
    fn set_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), RunnerError> {
        Err(DeviceLost(format!("{adapter:?} for {slot:?} of a runner without slots")).into())
    }

    /// Queues copies of blocks, in this order, behind the steps in flight and before those that are launched later. A runner
    /// without host blocks copies nothing and is never asked for more.
    ///
    /// # Errors
    /// [`RunnerError::DeviceLost`] always: nobody knows what the blocks hold that were to be overwritten.
    fn copy(&mut self, copies: &[BlockCopy]) -> Result<(), RunnerError> {
        match copies {
            [] => Ok(()),
            [first, ..] => Err(DeviceLost(format!("{first:?} on a runner without host blocks")).into()),
        }
    }
}

impl<R: Runner + ?Sized> Runner for Box<R> {
    fn launch(&mut self, plan: &StepPlan) -> Result<(), RunnerError> {
        (**self).launch(plan)
    }

    fn wait(&mut self) -> Result<StepOutput, RunnerError> {
        (**self).wait()
    }

    fn is_done(&mut self) -> bool {
        (**self).is_done()
    }

    fn set_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), RunnerError> {
        (**self).set_adapter(slot, adapter)
    }

    fn copy(&mut self, copies: &[BlockCopy]) -> Result<(), RunnerError> {
        (**self).copy(copies)
    }
}

/// Why a step has no results.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunnerError {
    /// This step failed; others may succeed.
    #[error("{0}")]
    Step(String),
    /// The device is lost, and with it everything on it: nothing will ever succeed again.
    #[error(transparent)]
    DeviceLost(#[from] DeviceLost),
}

/// The device answers nothing any more. In the driver's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceLost(pub String);

impl From<KernelError> for RunnerError {
    fn from(error: KernelError) -> Self {
        match &error {
            KernelError::DeviceLost { .. } => DeviceLost(error.to_string()).into(),
            _ => Self::Step(error.to_string()),
        }
    }
}
