//! A step on the CPU: its metadata, its tasks and what has come of them.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::{
    ops::{BatchMeta, FEEDBACK, StepResults},
    sampling::{RowTask, Sampled},
};

/// A step's metadata and tasks.
pub struct CpuBatch {
    pub(super) meta: Arc<BatchMeta>,
    pub(super) tasks: Arc<[RowTask]>,
    pub(super) results: Mutex<StepResults>,
}

impl CpuBatch {
    /// The metadata, with every token id in its place.
    pub fn meta(&self) -> &BatchMeta {
        &self.meta
    }

    pub(super) fn new(meta: Arc<BatchMeta>, tasks: Arc<[RowTask]>) -> Self {
        Self { meta, tasks, results: Mutex::default() }
    }
}

/// The tokens that the previous step sampled: what [`FEEDBACK`] refers to.
#[derive(Default)]
pub(super) struct Feedback(Mutex<Vec<u32>>);

impl Feedback {
    pub(super) fn keep(&self, sampled: &[Sampled]) {
        let mut tokens = self.0.lock();
        tokens.clear();
        tokens.extend(sampled.iter().map(|row| row.token));
    }

    /// Puts tokens in place of references to them.
    pub(super) fn resolve(&self, mut meta: Arc<BatchMeta>) -> Arc<BatchMeta> {
        if meta.token_ids.iter().any(|id| id & FEEDBACK != 0) {
            let tokens = self.0.lock();
            for id in &mut Arc::make_mut(&mut meta).token_ids {
                if *id & FEEDBACK != 0 {
                    *id = tokens[(*id & !FEEDBACK) as usize];
                }
            }
        }
        meta
    }
}
