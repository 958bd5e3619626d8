//! The emulator as a driver.

use std::{alloc::Layout, collections::HashMap, ffi::c_void};

use parking_lot::Mutex;
use tidemill_kernels::{
    KernelError,
    cuda::driver::{DevPtr, DeviceInfo, Driver, EventId, GraphId, Kernel, LaunchConfig, Pinned, Result},
};

use crate::runtime::{self, Schedule, Stats};

/// A CPU that poses as a GPU. Everything queued runs at once, on the calling thread.
pub struct EmuDriver {
    info: DeviceInfo,
    schedule: Mutex<Schedule>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pinned: HashMap<usize, Layout>,
    next_id: u64,
    capture: Option<Vec<Op>>,
    graphs: HashMap<u64, Vec<Op>>,
}

/// One queued operation.
#[derive(Clone)]
enum Op {
    Copy { dst: usize, src: usize, bytes: usize },
    Fill { dst: usize, value: u8, bytes: usize },
    Launch { kernel: &'static Kernel, config: LaunchConfig, arguments: Vec<Vec<u8>> },
}

impl EmuDriver {
    /// A device of 1 GiB that runs kernels under `schedule`.
    pub fn new(schedule: Schedule) -> Self {
        let info = DeviceInfo {
            name: "CUDA on CPU".into(),
            compute_capability: (8, 0),
            num_sms: 4,
            total_memory: 1 << 30,
            l2_bytes: 1 << 20,
            max_shared_bytes: 99 << 10,
        };
        Self { info, schedule: Mutex::new(schedule), state: Mutex::default() }
    }

    /// Changes the schedule of all later launches.
    pub fn set_schedule(&self, schedule: Schedule) {
        *self.schedule.lock() = schedule;
    }

    /// Statistics of the last launch.
    pub fn last_stats(&self) -> Stats {
        runtime::last_stats()
    }

    fn queue(&self, op: Op) -> Result<()> {
        let mut state = self.state.lock();
        match &mut state.capture {
            Some(ops) => {
                ops.push(op);
                Ok(())
            }
            None => {
                drop(state);
                self.run(&op)
            }
        }
    }

    fn run(&self, op: &Op) -> Result<()> {
        match op {
            // SAFETY: whoever queued it promised that the ranges are valid.
            Op::Copy { dst, src, bytes } => unsafe {
                std::ptr::copy_nonoverlapping(*src as *const u8, *dst as *mut u8, *bytes);
            },
            // SAFETY: as above.
            Op::Fill { dst, value, bytes } => unsafe {
                std::ptr::write_bytes(*dst as *mut u8, *value, *bytes);
            },
            Op::Launch { kernel, config, arguments } => {
                // Eight-byte aligned copies of the values, as the kernel's parameters are.
                let mut values: Vec<Vec<u64>> = arguments.iter().map(|bytes| aligned(bytes)).collect();
                let mut pointers: Vec<*mut c_void> =
                    values.iter_mut().map(|value| value.as_mut_ptr().cast()).collect();
                let schedule = *self.schedule.lock();
                // SAFETY: one value per parameter; addresses are the promise of whoever queued it.
                unsafe {
                    runtime::launch(
                        kernel.name,
                        config.grid,
                        config.block,
                        config.shared_bytes,
                        &mut pointers,
                        schedule,
                    )
                }
                .map_err(|detail| KernelError::Device { call: kernel.name, detail })?;
            }
        }
        Ok(())
    }

    fn next_id(&self) -> u64 {
        let mut state = self.state.lock();
        state.next_id += 1;
        state.next_id
    }
}

fn aligned(bytes: &[u8]) -> Vec<u64> {
    let mut words = vec![0_u64; bytes.len().div_ceil(8).max(1)];
    // SAFETY: the words hold at least that many bytes.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), words.as_mut_ptr().cast::<u8>(), bytes.len()) };
    words
}

impl Driver for EmuDriver {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(self.info.total_memory)
    }

    fn alloc(&self, bytes: usize, what: &'static str) -> Result<DevPtr> {
        let ptr = runtime::alloc(bytes);
        if ptr.is_null() { Err(KernelError::OutOfMemory { what, bytes }) } else { Ok(DevPtr(ptr as u64)) }
    }

    unsafe fn free(&self, ptr: DevPtr) {
        // SAFETY: the caller's promise.
        unsafe { runtime::free(ptr.0 as *mut u8) }
    }

    fn alloc_pinned(&self, bytes: usize, _usage: Pinned) -> Result<*mut u8> {
        let layout = Layout::from_size_align(bytes, 4096)
            .map_err(|_| KernelError::OutOfMemory { what: "pinned memory", bytes })?;
        // SAFETY: the layout is not empty: callers ask for at least one byte.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        if ptr.is_null() {
            return Err(KernelError::OutOfMemory { what: "pinned memory", bytes });
        }
        self.state.lock().pinned.insert(ptr as usize, layout);
        Ok(ptr)
    }

    unsafe fn free_pinned(&self, ptr: *mut u8) {
        if let Some(layout) = self.state.lock().pinned.remove(&(ptr as usize)) {
            // SAFETY: allocated above with this layout.
            unsafe { std::alloc::dealloc(ptr, layout) }
        }
    }

    unsafe fn copy_to_device(&self, dst: DevPtr, src: *const u8, bytes: usize) -> Result<()> {
        self.queue(Op::Copy { dst: dst.0 as usize, src: src as usize, bytes })
    }

    unsafe fn copy_to_host(&self, dst: *mut u8, src: DevPtr, bytes: usize) -> Result<()> {
        self.queue(Op::Copy { dst: dst as usize, src: src.0 as usize, bytes })
    }

    unsafe fn fill(&self, dst: DevPtr, value: u8, bytes: usize) -> Result<()> {
        self.queue(Op::Fill { dst: dst.0 as usize, value, bytes })
    }

    unsafe fn launch(
        &self,
        kernel: &'static Kernel,
        config: LaunchConfig,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let copy = |(&ptr, &size): (&*mut c_void, &usize)| {
            // SAFETY: one value of this size per parameter, as the caller promised.
            unsafe { std::slice::from_raw_parts(ptr.cast::<u8>(), size) }.to_vec()
        };
        let arguments = arguments.iter().zip(kernel.parameter_sizes).map(copy).collect();
        self.queue(Op::Launch { kernel, config, arguments })
    }

    fn create_event(&self) -> Result<EventId> {
        Ok(EventId(self.next_id()))
    }

    fn record(&self, _event: EventId) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _event: EventId) -> Result<()> {
        Ok(())
    }

    fn elapsed_ms(&self, _start: EventId, _end: EventId) -> Result<f32> {
        Ok(0.0)
    }

    unsafe fn destroy_event(&self, _event: EventId) {}

    fn begin_capture(&self) -> Result<()> {
        self.state.lock().capture = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<GraphId> {
        let id = self.next_id();
        let mut state = self.state.lock();
        let ops = state.capture.take().unwrap_or_default();
        state.graphs.insert(id, ops);
        Ok(GraphId(id))
    }

    unsafe fn launch_graph(&self, graph: GraphId) -> Result<()> {
        let ops = self.state.lock().graphs.get(&graph.0).cloned().unwrap_or_default();
        ops.into_iter().try_for_each(|op| self.queue(op))
    }

    unsafe fn destroy_graph(&self, graph: GraphId) {
        self.state.lock().graphs.remove(&graph.0);
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
