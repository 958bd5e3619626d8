//! How others learn that the engine thread has ended, and why.

use crate::{error::StopReason, sync::OnceLock};

/// Why the engine thread ended, once it has.
///
/// Handles and streams notice the end by channels that close, and then ask here. So the reason is written before any of them closes.
#[derive(Debug, Default)]
pub(crate) struct Stopped {
    reason: OnceLock<StopReason>,
}

impl Stopped {
    /// The reason, once there is one.
    pub(crate) fn get(&self) -> Option<&StopReason> {
        self.reason.get()
    }

    /// The reason, for whoever has found a channel of the engine thread closed.
    pub(crate) fn reason(&self) -> StopReason {
        self.get().cloned().unwrap_or_else(|| StopReason::Stopped("it was shut down".into()))
    }

    /// The engine thread ends. `open` is all that closes with it.
    pub(crate) fn end<T>(&self, reason: StopReason, open: T) {
        self.reason.get_or_init(|| reason);
        drop(open);
    }
}
