//! [`Driver`] over the CUDA driver API.
//!
//! Memory comes from the device's stream-ordered pool (`cuMemAllocAsync`): a free is then an operation of the stream, as the
//! trait promises, and never makes the host wait. The pool keeps up to [`KEPT_BYTES`] of what was freed; the rest goes back at
//! the next synchronisation, so that what was freed counts as free for large allocations.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    ffi::{CString, c_void},
    ptr,
};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUevent, CUfunction, CUfunction_attribute, CUgraphExec, CUmemPool_attribute,
    CUmemoryPool, CUmodule, CUresult, CUstream, CUstream_flags, CUstreamCaptureMode,
};
use parking_lot::Mutex;

use super::{
    error::GpuError,
    images::{Image, KernelOrigin},
    status::{Failure, call, check},
};
use crate::{
    cuda::{
        driver::{DevPtr, DeviceInfo, Driver, EventId, GraphId, Kernel, LaunchConfig, Pinned, Result},
        table,
    },
    error::KernelError,
};

/// Freed memory that the pool keeps for the next allocations.
const KEPT_BYTES: u64 = 64 << 20;

/// An NVIDIA GPU: its primary context, one stream, and the kernels. May be used from any thread.
pub struct GpuDriver {
    info: DeviceInfo,
    origin: KernelOrigin,
    handles: Handles,
    /// By the address of the kernel's entry in the table.
    functions: HashMap<usize, CUfunction>,
    state: Mutex<State>,
}

/// What the driver gave, each valid until this is dropped.
struct Handles {
    context: CUcontext,
    pool: CUmemoryPool,
    stream: CUstream,
    modules: Vec<CUmodule>,
}

#[derive(Default)]
struct State {
    /// Page-locked ranges, by their beginning: their lengths.
    pinned: BTreeMap<usize, usize>,
    capturing: bool,
    /// Memory that was freed during the capture.
    freed: Vec<DevPtr>,
}

// SAFETY: handles of the driver API may be used from every thread in whose context they are; each method makes it current.
unsafe impl Send for GpuDriver {}
// SAFETY: as above; the driver API is thread-safe, and our own state lies behind a lock.
unsafe impl Sync for GpuDriver {}

thread_local! {
    /// The context that this thread made current last. Primary contexts stay retained for the life of the process, so an address
    /// names one for ever.
    static CURRENT: Cell<CUcontext> = const { Cell::new(ptr::null_mut()) };
}

impl Handles {
    fn new(device: CUdevice) -> std::result::Result<Self, Failure> {
        let mut handles = Handles {
            context: ptr::null_mut(),
            pool: ptr::null_mut(),
            stream: ptr::null_mut(),
            modules: Vec::new(),
        };
        let mut kept = KEPT_BYTES;
        // SAFETY: each call writes one handle, or reads the one number that the attribute takes. Not the default stream, as
        // that cannot be captured.
        unsafe {
            call!(cuDevicePrimaryCtxRetain(&mut handles.context, device))?;
            handles.make_current()?;
            call!(cuStreamCreate(&mut handles.stream, CUstream_flags::CU_STREAM_NON_BLOCKING as u32))?;
            call!(cuDeviceGetDefaultMemPool(&mut handles.pool, device))?;
            let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            call!(cuMemPoolSetAttribute(handles.pool, threshold, (&raw mut kept).cast()))?;
        }
        Ok(handles)
    }

    fn make_current(&self) -> std::result::Result<(), Failure> {
        if CURRENT.get() != self.context {
            // SAFETY: the context is retained for ever.
            unsafe { call!(cuCtxSetCurrent(self.context)) }?;
            CURRENT.set(self.context);
        }
        Ok(())
    }

    fn load(&mut self, image: &[u8]) -> std::result::Result<CUmodule, Failure> {
        let mut module = ptr::null_mut();
        // SAFETY: the image tells its own length; it was made whole by a compiler, or its hash was checked.
        unsafe { call!(cuModuleLoadData(&mut module, image.as_ptr().cast())) }?;
        self.modules.push(module);
        Ok(module)
    }
}

impl Drop for Handles {
    fn drop(&mut self) {
        // What fails here fails because the device is lost, and then there is nothing left to give back.
        let _ = self.make_current();
        if !self.stream.is_null() {
            // SAFETY: created once, destroyed here alone, after the work on it.
            let _ = unsafe {
                call!(cuStreamSynchronize(self.stream)).and(call!(cuStreamDestroy_v2(self.stream)))
            };
        }
        for &module in &self.modules {
            // SAFETY: loaded once, unloaded here alone; nothing runs any more.
            let _ = unsafe { call!(cuModuleUnload(module)) };
        }
    }
}

impl GpuDriver {
    /// Loads `images` on a device and finds every kernel of the table in them.
    pub(super) fn new(
        device: CUdevice,
        info: DeviceInfo,
        images: &[Image],
        origin: KernelOrigin,
    ) -> std::result::Result<Self, GpuError> {
        let mut handles = Handles::new(device)?;
        let mut modules = HashMap::new();
        for (file, image) in images {
            modules.insert(*file, handles.load(image)?);
        }
        let mut functions = HashMap::new();
        for kernel in table::all() {
            let Some(&module) = modules.get(kernel.file) else {
                let detail = format!("no image of {}.cu", kernel.file);
                return Err(GpuError::Driver { call: "cuModuleGetFunction", detail });
            };
            functions.insert(address(kernel), find_function(module, kernel, info.max_shared_bytes)?);
        }
        Ok(Self { info, origin, handles, functions, state: Mutex::default() })
    }

    /// Where the kernels came from.
    pub fn kernel_origin(&self) -> &KernelOrigin {
        &self.origin
    }

    /// The stream, with the context current on this thread.
    fn stream(&self) -> Result<CUstream> {
        self.handles.make_current()?;
        Ok(self.handles.stream)
    }

    /// Refuses what cannot be recorded.
    fn not_while_recording(&self, call: &'static str) -> Result<()> {
        if self.state.lock().capturing {
            return Err(KernelError::Device {
                call,
                detail: "not possible while a graph is recorded".into(),
            });
        }
        Ok(())
    }

    fn pool_bytes(&self, which: CUmemPool_attribute) -> Result<usize> {
        let mut bytes = 0_u64;
        // SAFETY: writes one u64.
        unsafe { call!(cuMemPoolGetAttribute(self.handles.pool, which, (&raw mut bytes).cast())) }?;
        Ok(bytes as usize)
    }
}

fn address(kernel: &'static Kernel) -> usize {
    ptr::from_ref(kernel) as usize
}

/// Looks a kernel up and lets it use all the dynamic shared memory that its static one leaves.
fn find_function(
    module: CUmodule,
    kernel: &Kernel,
    max_shared_bytes: usize,
) -> std::result::Result<CUfunction, GpuError> {
    let name = CString::new(kernel.name).expect("kernel names hold no NUL");
    let (mut function, mut fixed) = (ptr::null_mut(), 0);
    // SAFETY: the module is loaded; the name ends with a NUL; each call writes one value.
    unsafe {
        let found = call!(cuModuleGetFunction(&mut function, module, name.as_ptr()));
        found.map_err(|failure| match GpuError::from(failure) {
            GpuError::Driver { call, detail } => {
                GpuError::Driver { call, detail: format!("{}.cu, {}: {detail}", kernel.file, kernel.name) }
            }
            other => other,
        })?;
        let shared = CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        call!(cuFuncGetAttribute(&mut fixed, shared, function))?;
        let dynamic = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        call!(cuFuncSetAttribute(function, dynamic, (max_shared_bytes as i32 - fixed).max(0)))?;
    }
    Ok(function)
}

impl Driver for GpuDriver {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_memory(&self) -> Result<usize> {
        self.stream()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        unsafe { call!(cuMemGetInfo_v2(&mut free, &mut total)) }?;
        let reserved = self.pool_bytes(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = self.pool_bytes(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok(free + reserved.saturating_sub(used))
    }

    fn alloc(&self, bytes: usize, what: &'static str) -> Result<DevPtr> {
        let stream = self.stream()?;
        self.not_while_recording("cuMemAllocAsync")?;
        let mut ptr = 0;
        // SAFETY: writes one address. The pool aligns to 256 bytes or more.
        unsafe { call!(cuMemAllocAsync(&mut ptr, bytes, stream)) }.map_err(|e| exhausted(e, what, bytes))?;
        Ok(DevPtr(ptr))
    }

    unsafe fn free(&self, ptr: DevPtr) {
        let mut state = self.state.lock();
        if state.capturing {
            // Freed now it would become a part of the graph; what was queued before the recording may still use it.
            state.freed.push(ptr);
            return;
        }
        drop(state);
        if let Ok(stream) = self.stream() {
            // SAFETY: the caller's promise. A failure means that the device is lost, and the next call says so.
            let _ = unsafe { call!(cuMemFreeAsync(ptr.0, stream)) };
        }
    }

    fn alloc_pinned(&self, bytes: usize, usage: Pinned) -> Result<*mut u8> {
        self.stream()?;
        self.not_while_recording("cuMemHostAlloc")?;
        let flags = match usage {
            Pinned::Upload => sys::CU_MEMHOSTALLOC_WRITECOMBINED,
            Pinned::Readback => 0,
        };
        let mut memory: *mut c_void = ptr::null_mut();
        // SAFETY: writes one address.
        unsafe { call!(cuMemHostAlloc(&mut memory, bytes, flags)) }
            .map_err(|e| exhausted(e, "page-locked host memory", bytes))?;
        self.state.lock().pinned.insert(memory as usize, bytes);
        Ok(memory.cast())
    }

    unsafe fn free_pinned(&self, ptr: *mut u8) {
        self.state.lock().pinned.remove(&(ptr as usize));
        if self.stream().is_ok() {
            // SAFETY: the caller's promise. A failure means that the device is lost, and the next call says so.
            let _ = unsafe { call!(cuMemFreeHost(ptr.cast())) };
        }
    }

    unsafe fn copy_to_device(&self, dst: DevPtr, src: *const u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.stream()?;
        let pinned = self.state.lock().is_pinned(src as usize, bytes);
        if !pinned {
            self.not_while_recording("cuMemcpyHtoDAsync from pageable memory")?;
        }
        // SAFETY: the caller's promise.
        unsafe { call!(cuMemcpyHtoDAsync_v2(dst.0, src.cast(), bytes, stream)) }?;
        if !pinned {
            // Where the GPU reads pageable memory itself (Grace, HMM), the driver does not stage it before it returns.
            // SAFETY: has no preconditions.
            unsafe { call!(cuStreamSynchronize(stream)) }?;
        }
        Ok(())
    }

    unsafe fn copy_to_host(&self, dst: *mut u8, src: DevPtr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.stream()?;
        // SAFETY: the caller's promise.
        Ok(unsafe { call!(cuMemcpyDtoHAsync_v2(dst.cast(), src.0, bytes, stream)) }?)
    }

    unsafe fn fill(&self, dst: DevPtr, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.stream()?;
        // SAFETY: the caller's promise.
        Ok(unsafe { call!(cuMemsetD8Async(dst.0, value, bytes, stream)) }?)
    }

    unsafe fn launch(
        &self,
        kernel: &'static Kernel,
        config: LaunchConfig,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        debug_assert_eq!(arguments.len(), kernel.parameter_sizes.len());
        let Some(&function) = self.functions.get(&address(kernel)) else {
            return Err(KernelError::Device {
                call: kernel.name,
                detail: "not in the table of kernels".into(),
            });
        };
        let stream = self.stream()?;
        let ([gx, gy, gz], [bx, by, bz]) = (config.grid, config.block);
        // SAFETY: the caller's promise; the driver copies the arguments before it returns.
        let code = unsafe {
            sys::cuLaunchKernel(
                function,
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                config.shared_bytes,
                stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        Ok(check(kernel.name, code)?)
    }

    fn create_event(&self) -> Result<EventId> {
        self.stream()?;
        let mut event = ptr::null_mut();
        // SAFETY: writes one handle. Flags 0: it takes the time, and who waits for it spins, as every step does.
        unsafe { call!(cuEventCreate(&mut event, 0)) }?;
        Ok(EventId(event as u64))
    }

    fn record(&self, event: EventId) -> Result<()> {
        let stream = self.stream()?;
        self.not_while_recording("cuEventRecord")?;
        // SAFETY: an id is the handle that `create_event` got.
        Ok(unsafe { call!(cuEventRecord(event.0 as CUevent, stream)) }?)
    }

    fn wait(&self, event: EventId) -> Result<()> {
        self.stream()?;
        self.not_while_recording("cuEventSynchronize")?;
        // SAFETY: as above.
        Ok(unsafe { call!(cuEventSynchronize(event.0 as CUevent)) }?)
    }

    fn is_reached(&self, event: EventId) -> Result<bool> {
        self.stream()?;
        // SAFETY: as above.
        match unsafe { sys::cuEventQuery(event.0 as CUevent) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => Ok(check("cuEventQuery", code).map(|()| true)?),
        }
    }

    fn elapsed_ms(&self, start: EventId, end: EventId) -> Result<f32> {
        type Elapsed = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;
        self.stream()?;
        let mut ms = 0.0;
        // SAFETY: the type is that of cuda.h. By hand, as the bindings know only the `_v2` that came with CUDA 12.8; the ids are
        // handles that `create_event` got.
        unsafe {
            let Ok(elapsed) = sys::culib().get::<Elapsed>(b"cuEventElapsedTime") else {
                let detail = "the driver does not have it".into();
                return Err(KernelError::Device { call: "cuEventElapsedTime", detail });
            };
            check("cuEventElapsedTime", elapsed(&mut ms, start.0 as CUevent, end.0 as CUevent))?;
        }
        Ok(ms)
    }

    unsafe fn destroy_event(&self, event: EventId) {
        if self.stream().is_ok() {
            // SAFETY: the caller's promise. A failure means that the device is lost, and the next call says so.
            let _ = unsafe { call!(cuEventDestroy_v2(event.0 as CUevent)) };
        }
    }

    fn begin_capture(&self) -> Result<()> {
        let stream = self.stream()?;
        let mut state = self.state.lock();
        // Relaxed: what must not be called meanwhile is refused above, and any thread may end what another one began.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is not the default one.
        unsafe { call!(cuStreamBeginCapture_v2(stream, mode)) }?;
        state.capturing = true;
        Ok(())
    }

    fn end_capture(&self) -> Result<GraphId> {
        let stream = self.stream()?;
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        let mut state = self.state.lock();
        // SAFETY: writes one handle, or null with an error.
        let ended = unsafe { call!(cuStreamEndCapture(stream, &mut graph)) };
        state.capturing = false;
        let freed = std::mem::take(&mut state.freed);
        drop(state);
        for ptr in freed {
            // SAFETY: whoever freed it promised that nothing queued later uses it.
            unsafe { self.free(ptr) }
        }
        ended?;
        // SAFETY: the graph was made above and is destroyed here alone; the executable graph does not need it. It is uploaded now so
        // that its first launch costs what every other one does.
        unsafe {
            let made = call!(cuGraphInstantiateWithFlags(&mut exec, graph, 0));
            call!(cuGraphDestroy(graph))?;
            made?;
            call!(cuGraphUpload(exec, stream))?;
        }
        Ok(GraphId(exec as u64))
    }

    unsafe fn launch_graph(&self, graph: GraphId) -> Result<()> {
        let stream = self.stream()?;
        // SAFETY: an id is the handle that `end_capture` got; the rest is the caller's promise.
        Ok(unsafe { call!(cuGraphLaunch(graph.0 as CUgraphExec, stream)) }?)
    }

    unsafe fn destroy_graph(&self, graph: GraphId) {
        if self.stream().is_ok() {
            // SAFETY: the caller's promise. A failure means that the device is lost, and the next call says so.
            let _ = unsafe { call!(cuGraphExecDestroy(graph.0 as CUgraphExec)) };
        }
    }

    fn synchronize(&self) -> Result<()> {
        let stream = self.stream()?;
        self.not_while_recording("cuStreamSynchronize")?;
        // SAFETY: has no preconditions.
        Ok(unsafe { call!(cuStreamSynchronize(stream)) }?)
    }
}

impl State {
    /// Whether the range lies in one page-locked allocation.
    fn is_pinned(&self, begin: usize, bytes: usize) -> bool {
        let before = self.pinned.range(..=begin).next_back();
        before.is_some_and(|(&start, &length)| begin + bytes <= start + length)
    }
}

fn exhausted(failure: Failure, what: &'static str, bytes: usize) -> KernelError {
    if failure.is_out_of_memory() { KernelError::OutOfMemory { what, bytes } } else { failure.into() }
}
