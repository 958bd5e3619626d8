//! What a test can ask of the emulated device.

use tidemill_kernels::cuda::driver::DeviceInfo;

use crate::schedule::Schedule;

/// An emulated device.
#[derive(Debug, Clone)]
pub struct EmuConfig {
    /// What the device says of itself. `total_memory` is the limit of all allocations together, `max_shared_bytes` that of a
    /// launch's dynamic shared memory.
    pub info: DeviceInfo,
    /// How launches run.
    pub schedule: Schedule,
    /// Run each operation when it is queued. Otherwise it runs when somebody waits for it, or when the queue is long: host code
    /// that reads a result too early, or reuses a staging buffer too early, then sees wrong data.
    pub eager: bool,
    /// Blocks in a cluster: as many run together and see each other's shared memory.
    pub cluster: u32,
    /// Bytes before dynamic shared memory, a multiple of 16: an alignment that a kernel only has by luck shows.
    pub shared_skew: u32,
}

impl Default for EmuConfig {
    /// A lazy device of 1 GiB and compute capability 8.0.
    fn default() -> Self {
        let info = DeviceInfo {
            name: "CUDA on CPU".into(),
            compute_capability: (8, 0),
            num_sms: 4,
            total_memory: 1 << 30,
            l2_bytes: 1 << 20,
            max_shared_bytes: 99 << 10,
        };
        Self { info, schedule: Schedule::default(), eager: false, cluster: 1, shared_skew: 0 }
    }
}

/// What goes wrong with a launch that a test picked; see [`crate::EmuDriver::fail_launch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The call returns `KernelError::Device` and queues nothing; the device works on.
    Refused,
    /// The call returns `KernelError::DeviceLost`, and so does every later call.
    Lost,
    /// The call succeeds and the kernel faults when it runs: whoever waits for it gets `KernelError::DeviceLost`.
    Faults,
}

/// What a driver still holds; all zero when its user has freed everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Live {
    /// Bytes of device memory.
    pub device_bytes: usize,
    /// Bytes of page-locked memory.
    pub pinned_bytes: usize,
    /// Events.
    pub events: usize,
    /// Graphs.
    pub graphs: usize,
}
