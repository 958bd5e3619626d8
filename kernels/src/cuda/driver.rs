//! What a device must do, in the shape of the CUDA driver API.
//!
//! Two implementations: [`super::gpu`] over cudarc, and the emulator (`kernels/emu`, a dev-dependency), which executes the
//! same `.cu` files on the CPU. Everything above this trait is therefore the same code in CI and on a GPU.
//!
//! A driver has one stream. Copies, fills, launches and graph launches are queued on it in order and return at once; host
//! memory that a queued copy reads or writes must be left alone until an event recorded after it has been waited for.

use std::ffi::c_void;

use crate::error::KernelError;

/// Result of a driver call.
pub type Result<T> = std::result::Result<T, KernelError>;

/// An address in device memory: a `CUdeviceptr` on a GPU, a plain pointer under the emulator. 0 is null.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct DevPtr(pub u64);

impl DevPtr {
    /// No memory: what a kernel gets for an optional tensor that is absent.
    pub const NULL: DevPtr = DevPtr(0);

    /// The address `bytes` further on.
    #[must_use]
    pub fn offset(self, bytes: usize) -> DevPtr {
        DevPtr(self.0 + bytes as u64)
    }
}

/// What a device is, read once when it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The vendor's name for it.
    pub name: String,
    /// Compute capability, major and minor: `(9, 0)` is Hopper.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub num_sms: u32,
    /// Device memory in bytes.
    pub total_memory: usize,
    /// L2 cache in bytes.
    pub l2_bytes: usize,
    /// Dynamic shared memory that one block may ask for, in bytes.
    pub max_shared_bytes: usize,
}

/// Extents of a launch, as in CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads per block in x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
}

impl LaunchConfig {
    /// A grid of `blocks` blocks of `threads` threads, without dynamic shared memory.
    pub fn linear(blocks: usize, threads: u32) -> Self {
        Self { grid: [blocks as u32, 1, 1], block: [threads, 1, 1], shared_bytes: 0 }
    }
}

/// A kernel as both sides know it: which file, which function, and the sizes of its parameters in bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// `kernels/cuda/<file>.cu`.
    pub file: &'static str,
    /// The `extern "C"` function in it.
    pub name: &'static str,
    /// One size per parameter, compared with the compiled kernel's in a test.
    pub parameter_sizes: &'static [usize],
}

/// How page-locked host memory is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pinned {
    /// Written by the host, read by the device: write-combined, never read it on the host.
    Upload,
    /// Written by the device, read by the host, or by the device again.
    Readback,
}

/// An event of a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventId(pub u64);

/// A captured graph of a driver, ready to launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GraphId(pub u64);

/// A device with one stream. See the module's documentation for the order of things.
///
/// Errors are [`KernelError::OutOfMemory`], [`KernelError::Device`] for a call that failed alone, and
/// [`KernelError::DeviceLost`] for a sticky error: the device answers nothing any more, and the process must end.
pub trait Driver: Send + Sync {
    /// What the device is.
    fn info(&self) -> &DeviceInfo;

    /// Device memory that is free now, in bytes.
    fn free_memory(&self) -> Result<usize>;

    /// Allocates device memory, 256-byte aligned, contents unspecified. `what` names it in the error.
    fn alloc(&self, bytes: usize, what: &'static str) -> Result<DevPtr>;

    /// Frees what [`Driver::alloc`] gave, once everything queued before has run.
    ///
    /// # Safety
    /// `ptr` came from this driver's `alloc`, is freed once, and nothing queued later uses it.
    unsafe fn free(&self, ptr: DevPtr);

    /// Allocates page-locked host memory.
    fn alloc_pinned(&self, bytes: usize, usage: Pinned) -> Result<*mut u8>;

    /// Frees what [`Driver::alloc_pinned`] gave.
    ///
    /// # Safety
    /// `ptr` came from this driver's `alloc_pinned`, is freed once, and no queued copy uses it.
    unsafe fn free_pinned(&self, ptr: *mut u8);

    /// Queues a copy from host to device. The source may be pageable; it is then read before the call returns.
    ///
    /// # Safety
    /// Both ranges are valid; a pinned source stays unchanged until the copy has run.
    unsafe fn copy_to_device(&self, dst: DevPtr, src: *const u8, bytes: usize) -> Result<()>;

    /// Queues a copy from device to pinned host memory.
    ///
    /// # Safety
    /// Both ranges are valid; nobody touches `dst` until the copy has run.
    unsafe fn copy_to_host(&self, dst: *mut u8, src: DevPtr, bytes: usize) -> Result<()>;

    /// Queues a fill of `bytes` bytes with `value`.
    ///
    /// # Safety
    /// The range is valid.
    unsafe fn fill(&self, dst: DevPtr, value: u8, bytes: usize) -> Result<()>;

    /// Queues a kernel. A grid without blocks is a mistake of the caller.
    ///
    /// # Safety
    /// `arguments` points at one value per parameter of the kernel, of the size it has there, and every address among
    /// them is valid for what the kernel's header says it reads and writes.
    unsafe fn launch(
        &self,
        kernel: &'static Kernel,
        config: LaunchConfig,
        arguments: &mut [*mut c_void],
    ) -> Result<()>;

    /// Makes an event.
    fn create_event(&self) -> Result<EventId>;

    /// Queues the event's recording. It may be recorded again once it has been waited for.
    fn record(&self, event: EventId) -> Result<()>;

    /// Blocks the calling thread until the event's last recording has been reached.
    fn wait(&self, event: EventId) -> Result<()>;

    /// Whether the event's last recording has been reached. Does not block.
    fn is_reached(&self, event: EventId) -> Result<bool>;

    /// Milliseconds between two recorded events that were waited for.
    fn elapsed_ms(&self, start: EventId, end: EventId) -> Result<f32>;

    /// Destroys an event.
    ///
    /// # Safety
    /// It came from this driver and is not used again.
    unsafe fn destroy_event(&self, event: EventId);

    /// From here on, what is queued is recorded and not run, until [`Driver::end_capture`]. Only copies, fills and launches may
    /// be recorded; no allocation, event or wait.
    fn begin_capture(&self) -> Result<()>;

    /// Ends the recording and makes it a graph.
    fn end_capture(&self) -> Result<GraphId>;

    /// Queues everything that was recorded, with the addresses and values it was recorded with.
    ///
    /// # Safety
    /// The memory it uses still lives.
    unsafe fn launch_graph(&self, graph: GraphId) -> Result<()>;

    /// Destroys a graph.
    ///
    /// # Safety
    /// It came from this driver, nothing queued uses it, and it is not used again.
    unsafe fn destroy_graph(&self, graph: GraphId);

    /// Blocks until everything queued has run, and reports what went wrong in it.
    fn synchronize(&self) -> Result<()>;
}
