//! Owned device memory, and the checks at an op's door.

use std::sync::Arc;

use super::driver::{DevPtr, Driver, EventId, GraphId, Pinned, Result};
use crate::{error::KernelError, tensor::DType};

/// Device memory that is freed when it is dropped.
pub struct DeviceMemory {
    driver: Arc<dyn Driver>,
    ptr: DevPtr,
    bytes: usize,
}

impl DeviceMemory {
    /// Allocates; `what` names it in the error.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn new(driver: Arc<dyn Driver>, bytes: usize, what: &'static str) -> Result<Self> {
        let ptr = driver.alloc(bytes.max(1), what)?;
        Ok(Self { driver, ptr, bytes })
    }

    /// Where it begins.
    pub fn ptr(&self) -> DevPtr {
        self.ptr
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: allocated by this driver, owned here alone.
        unsafe { self.driver.free(self.ptr) }
    }
}

/// Page-locked host memory that is freed when it is dropped. Whoever queues copies on it waits for them first.
pub struct PinnedMemory {
    driver: Arc<dyn Driver>,
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: the memory is owned by this value alone.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// Allocates.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn new(driver: Arc<dyn Driver>, bytes: usize, usage: Pinned) -> Result<Self> {
        let ptr = driver.alloc_pinned(bytes.max(1), usage)?;
        Ok(Self { driver, ptr, bytes })
    }

    /// Where it begins.
    pub fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its bytes, for a host that writes.
    ///
    /// # Safety
    /// No queued copy uses them.
    pub unsafe fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this size and initialised by the driver or before any read; exclusive through `self`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated by this driver, owned here alone; copies on it were waited for.
        unsafe { self.driver.free_pinned(self.ptr) }
    }
}

/// An event that is destroyed when it is dropped.
pub struct Event {
    driver: Arc<dyn Driver>,
    id: EventId,
}

impl Event {
    /// Makes one.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Self> {
        let id = driver.create_event()?;
        Ok(Self { driver, id })
    }

    /// Queues its recording.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn record(&self) -> Result<()> {
        self.driver.record(self.id)
    }

    /// Blocks until the last recording has been reached.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn wait(&self) -> Result<()> {
        self.driver.wait(self.id)
    }

    /// Whether the last recording has been reached. Does not block.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn is_reached(&self) -> Result<bool> {
        self.driver.is_reached(self.id)
    }

    /// Milliseconds from `start` to this event; both were recorded and waited for.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn elapsed_ms(&self, start: &Event) -> Result<f32> {
        self.driver.elapsed_ms(start.id, self.id)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by this driver, owned here alone.
        unsafe { self.driver.destroy_event(self.id) }
    }
}

/// A graph that is destroyed when it is dropped. Whoever drops it has waited for its last launch.
pub struct Graph {
    driver: Arc<dyn Driver>,
    id: GraphId,
}

impl Graph {
    /// Records what `queue` queues.
    ///
    /// # Errors
    /// What `queue` returned, or the driver.
    pub fn capture(driver: Arc<dyn Driver>, queue: impl FnOnce() -> Result<()>) -> Result<Self> {
        driver.begin_capture()?;
        let mut recording = Recording(Some(driver.as_ref()));
        let queued = queue();
        recording.0 = None;
        // The capture must end even when queueing failed.
        let graph = driver.end_capture().map(|id| Self { driver: driver.clone(), id });
        queued?;
        graph
    }

    /// Queues everything that was recorded.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Safety
    /// All memory that it was recorded with still lives.
    pub unsafe fn launch(&self) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.driver.launch_graph(self.id) }
    }
}

/// A capture that a panic must not leave open: everything queued later would be recorded.
struct Recording<'a>(Option<&'a dyn Driver>);

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Some(driver) = self.0
            && let Ok(graph) = driver.end_capture()
        {
            // SAFETY: made here, never launched.
            unsafe { driver.destroy_graph(graph) }
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: captured by this driver, owned here alone, not running any more.
        unsafe { self.driver.destroy_graph(self.id) }
    }
}

/// A device array of a fixed number of elements of one type.
pub struct DeviceBuffer {
    memory: DeviceMemory,
    dtype: DType,
    elems: usize,
}

impl DeviceBuffer {
    /// Allocates, contents unspecified.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn new(driver: Arc<dyn Driver>, dtype: DType, elems: usize, what: &'static str) -> Result<Self> {
        Ok(Self { memory: DeviceMemory::new(driver, elems * dtype.size(), what)?, dtype, elems })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn elems(&self) -> usize {
        self.elems
    }

    /// Where it begins.
    pub fn ptr(&self) -> DevPtr {
        self.memory.ptr()
    }

    /// Where it begins, if it holds at least `elems` elements of `dtype`.
    ///
    /// # Errors
    /// [`KernelError::Shape`], [`KernelError::Unsupported`].
    pub fn at_least(&self, op: &'static str, what: &str, dtype: DType, elems: usize) -> Result<DevPtr> {
        if self.dtype != dtype {
            let detail = format!("{what} holds {:?}, expected {dtype:?}", self.dtype);
            return Err(KernelError::Unsupported { op, detail });
        }
        if self.elems < elems {
            return Err(KernelError::Shape {
                op,
                what: what.into(),
                got: vec![self.elems],
                expected: vec![elems],
            });
        }
        Ok(self.ptr())
    }
}

/// Refuses an extent that a kernel's vector accesses cannot handle.
///
/// # Errors
/// [`KernelError::Unsupported`].
pub fn require_multiple(op: &'static str, what: &str, extent: usize, of: usize) -> Result<()> {
    if extent == 0 || !extent.is_multiple_of(of) {
        let detail =
            format!("{what} is {extent}; the CUDA kernel takes multiples of {of} (use --device cpu)");
        return Err(KernelError::Unsupported { op, detail });
    }
    Ok(())
}
