//! A step that has been sent to the device.

use std::{ops::Range, sync::Arc};

use parking_lot::Mutex;

use super::{
    decoder::lora::LoraStep,
    driver::Result,
    graphs::GraphKey,
    layout::Layout,
    ops::{AttentionKernels, BlockShape, Needs, PlanLimits, PlanShape, attention_plan},
    steps::{Slot, StateMemory},
};
use crate::{
    error::KernelError,
    ops::{BatchMeta, Extent},
    sampling::RowTask,
};

/// A step's metadata and tasks on the device.
pub struct CudaBatch {
    pub(super) extent: Extent,
    pub(super) layout: Layout,
    pub(super) kernels: AttentionKernels,
    pub(super) plan_words: usize,
    /// Absent where no row has an adapter.
    pub(super) lora: Option<LoraStep>,
    pub(super) groups: Vec<Group>,
    pub(super) tasks: Arc<[RowTask]>,
    pub(super) graph: Option<GraphKey>,
    pub(super) slot: Arc<Slot>,
    /// Set by the one op that takes hidden states.
    pub(super) states: Mutex<Option<States>>,
}

/// Hidden states on their way to the host.
pub(super) struct States {
    pub memory: Arc<StateMemory>,
    /// E times H.
    pub elems: usize,
}

/// Rows of logits that are computed together.
pub(super) struct Group {
    pub rows: Range<usize>,
    pub shape: BlockShape,
    /// Encoded tasks, until they are sent.
    pub words: Vec<u32>,
    pub needs: Needs,
    /// Where its tasks begin in the step's words.
    pub at: usize,
}

impl CudaBatch {
    /// The group of these rows.
    pub(super) fn group(&self, rows: &Range<usize>) -> Result<&Group> {
        self.groups.iter().find(|group| group.rows == *rows).ok_or_else(|| KernelError::Unsupported {
            op: "sample",
            detail: format!("rows {rows:?} are no group of this step"),
        })
    }
}

/// A step's attention.
pub(super) struct Plan {
    pub words: Vec<u32>,
    pub kernels: AttentionKernels,
}

impl Plan {
    pub fn new(meta: &BatchMeta, shape: PlanShape, limits: &PlanLimits) -> Result<Self> {
        let mut words = Vec::new();
        let kernels = attention_plan(&mut words, meta, &shape, limits)?;
        Ok(Self { words, kernels })
    }
}
