//! What can go wrong in an op.

/// An op was called against its contract, or the device could not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// A tensor does not have the shape that the op's contract asks for.
    #[error("{op}: {what} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// The op that refused.
        op: &'static str,
        /// Which of its arguments.
        what: String,
        /// The shape it got.
        got: Vec<usize>,
        /// The shape its contract asks for.
        expected: Vec<usize>,
    },
    /// The device has no more memory for an allocation.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// What was to be allocated.
        what: &'static str,
        /// Its size in bytes.
        bytes: usize,
    },
    /// The combination is not supported by this device's implementation of the op.
    #[error("{op}: {detail}")]
    Unsupported {
        /// The op that refused.
        op: &'static str,
        /// What it cannot do, and what to do instead.
        detail: String,
    },
    /// A call of the device's driver failed; the device still works.
    #[error("{call}: {detail}")]
    Device {
        /// The call that failed.
        call: &'static str,
        /// What the driver said.
        detail: String,
    },
    /// The device answers nothing any more: a sticky CUDA error. The process must end.
    #[error("the device is lost ({call}): {detail}")]
    DeviceLost {
        /// The call that reported it.
        call: &'static str,
        /// What the driver said.
        detail: String,
    },
}
