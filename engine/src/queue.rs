//! Places in the queue: a bound that is checked before a request reaches the engine thread.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

/// A request's place in the queue; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct QueueSlot(Arc<AtomicUsize>);

impl QueueSlot {
    /// Takes a place unless `max` are taken; the error is how many are.
    pub(crate) fn take(queued: &Arc<AtomicUsize>, max: usize) -> Result<Self, usize> {
        queued.fetch_update(Relaxed, Relaxed, |n| (n < max).then_some(n + 1))?;
        Ok(Self(queued.clone()))
    }
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
