//! The emulator as a driver.

use std::{ffi::c_void, sync::Arc};

use parking_lot::Mutex;
use tidemill_kernels::{
    KernelError,
    cuda::driver::{DevPtr, DeviceInfo, Driver, EventId, GraphId, Kernel, LaunchConfig, Pinned, Result},
};

use crate::{
    config::{EmuConfig, Failure, Live},
    memory::Place,
    runtime::{self, Site, Stats},
    schedule::Schedule,
    state::{Event, State, refused},
    stream::{Launch, Op, Source, argument},
};

/// Threads in a block, and blocks in y and z, as on every GPU.
const MAX_BLOCK_THREADS: u64 = 1024;
const MAX_GRID_YZ: u32 = 65_535;

/// A CPU that poses as a GPU, and is stricter than one.
///
/// - What is queued runs when somebody waits for it; see [`EmuConfig::eager`].
/// - A copy or a fill that leaves its allocation is refused, and so is a copy to host memory that is not page-locked.
/// - Freed device memory is unmapped as soon as what was queued before has run.
/// - A mistake in a call that returns nothing (`free` and its kin) is reported by the next call, or by a panic when the driver is
///   dropped.
/// - A kernel that faults loses the device: every later call returns [`KernelError::DeviceLost`].
///
/// Device memory is aligned to 16 bytes only, less than the trait promises, so that its end lies against a guard page.
pub struct EmuDriver {
    info: DeviceInfo,
    state: Mutex<State>,
}

impl EmuDriver {
    /// The default device under a schedule.
    pub fn new(schedule: Schedule) -> Self {
        Self::with(EmuConfig { schedule, ..EmuConfig::default() })
    }

    /// A device of one's own.
    pub fn with(config: EmuConfig) -> Self {
        let state = Mutex::new(State::new(&config));
        Self { info: config.info, state }
    }

    /// Changes the schedule of what is not queued yet.
    pub fn set_schedule(&self, schedule: Schedule) {
        let mut state = self.state.lock();
        // A failure is sticky: whoever waits hears of it.
        let _ = state.run_all("set_schedule");
        state.schedule = schedule;
    }

    /// Runs what is queued and returns the statistics of the last launch.
    pub fn last_stats(&self) -> Stats {
        let mut state = self.state.lock();
        let _ = state.run_all("last_stats");
        state.stats
    }

    /// Runs what is queued and returns every barrier and wait that launches on this device have come to.
    pub fn sites(&self) -> Vec<Site> {
        let mut state = self.state.lock();
        let _ = state.run_all("sites");
        state.sites.iter().cloned().collect()
    }

    /// Makes one barrier or wait do nothing in what is not queued yet: a fault planted in a kernel, for tests that must find it.
    pub fn skip_site(&self, site: Option<Site>) {
        let mut state = self.state.lock();
        let _ = state.run_all("skip_site");
        state.skip = site;
    }

    /// Makes a launch fail, after `launches_before` more that do not. A graph counts as one launch; a captured launch does not count.
    pub fn fail_launch(&self, launches_before: u64, failure: Failure) {
        self.state.lock().plan_failure(launches_before, failure);
    }

    /// What the driver's user has not freed.
    pub fn live(&self) -> Live {
        let state = self.state.lock();
        Live {
            device_bytes: state.device.live_bytes(),
            pinned_bytes: state.pinned.live_bytes(),
            events: state.events.len(),
            graphs: state.graphs.len(),
        }
    }

    /// Refuses a launch that a GPU would refuse when it is made.
    fn check_launch(&self, kernel: &'static Kernel, config: LaunchConfig, arguments: usize) -> Result<()> {
        let fail = |detail: String| Err(refused(kernel.name, detail));
        let Some(sizes) = runtime::parameter_sizes(kernel.name) else {
            return fail("no kernel of this name is compiled".into());
        };
        if sizes != kernel.parameter_sizes || arguments != sizes.len() {
            let table = kernel.parameter_sizes;
            return fail(format!(
                "{arguments} arguments, {table:?} bytes in the table, {sizes:?} in the kernel"
            ));
        }
        let threads: u64 = config.block.iter().map(|&n| u64::from(n)).product();
        if threads == 0 || threads > MAX_BLOCK_THREADS || config.block[2] > 64 {
            return fail(format!("a block of {:?} threads", config.block));
        }
        let [x, y, z] = config.grid;
        if x == 0 || x > i32::MAX as u32 || !(1..=MAX_GRID_YZ).contains(&y) || !(1..=MAX_GRID_YZ).contains(&z)
        {
            return fail(format!("a grid of {:?} blocks", config.grid));
        }
        if config.shared_bytes as usize > self.info.max_shared_bytes {
            let most = self.info.max_shared_bytes;
            return fail(format!("{} bytes of dynamic shared memory, at most {most}", config.shared_bytes));
        }
        Ok(())
    }

    /// Queues something that counts as a launch, unless a test wants it to fail.
    fn submit_launch(state: &mut State, call: &'static str, op: Op) -> Result<()> {
        let due = if state.capture.is_none() { state.due_failure() } else { None };
        match due {
            None => state.submit(call, op),
            Some(Failure::Refused) => Err(refused(call, "a failure that the test asked for")),
            Some(Failure::Lost) => {
                let detail = "a loss that the test asked for".to_owned();
                state.lose(detail.clone());
                Err(KernelError::DeviceLost { call, detail })
            }
            Some(Failure::Faults) => state.submit(call, Op::Fault),
        }
    }
}

impl Drop for EmuDriver {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        state.capture = None;
        let _ = state.run_all("drop");
        let mistakes = state.unreported();
        if !mistakes.is_empty() && !std::thread::panicking() {
            panic!("mistakes that no call has reported: {}", mistakes.join("; "));
        }
    }
}

impl Driver for EmuDriver {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_memory(&self) -> Result<usize> {
        let mut state = self.state.lock();
        state.enter("free_memory")?;
        Ok(state.device.free_bytes())
    }

    fn alloc(&self, bytes: usize, what: &'static str) -> Result<DevPtr> {
        const CALL: &str = "alloc";
        let mut state = self.state.lock();
        state.enter_outside_capture(CALL)?;
        if bytes == 0 {
            return Err(refused(CALL, format!("\"{what}\" has no bytes")));
        }
        if bytes > state.device.free_bytes() {
            // Memory that the queue is about to free counts, as on a GPU.
            state.run_all(CALL)?;
        }
        state.device.allocate(bytes, what).map(DevPtr).ok_or(KernelError::OutOfMemory { what, bytes })
    }

    unsafe fn free(&self, ptr: DevPtr) {
        const CALL: &str = "free";
        let mut state = self.state.lock();
        if state.capture.is_some() {
            state.mistake(CALL, "not allowed while a graph is captured");
        }
        match state.device.leave(ptr.0) {
            // A failure is sticky: whoever waits hears of it.
            Ok(()) => drop(state.push(CALL, Op::Free(ptr.0))),
            Err(detail) => state.mistake(CALL, detail),
        }
    }

    fn alloc_pinned(&self, bytes: usize, usage: Pinned) -> Result<*mut u8> {
        let mut state = self.state.lock();
        state.enter_outside_capture("alloc_pinned")?;
        state.pinned.allocate(bytes, usage).ok_or(KernelError::OutOfMemory { what: "pinned memory", bytes })
    }

    unsafe fn free_pinned(&self, ptr: *mut u8) {
        const CALL: &str = "free_pinned";
        let mut state = self.state.lock();
        if state.pinned.range(ptr).is_some_and(|range| state.host_range_in_use(&range)) {
            state.mistake(CALL, "a queued copy still uses it");
            // The copy must not run into freed memory.
            let _ = state.run_all(CALL);
        }
        if let Err(detail) = state.pinned.free(ptr) {
            state.mistake(CALL, detail);
        }
    }

    unsafe fn copy_to_device(&self, dst: DevPtr, src: *const u8, bytes: usize) -> Result<()> {
        const CALL: &str = "copy_to_device";
        let mut state = self.state.lock();
        state.enter(CALL)?;
        if bytes == 0 {
            return Ok(());
        }
        let place = state.pinned.place(src as usize, bytes).map_err(|detail| refused(CALL, detail))?;
        let src = match place {
            Place::Pinned(_) => Source::Pinned(src as usize),
            Place::Pageable if state.capture.is_some() => {
                return Err(refused(CALL, "a graph cannot hold a copy from pageable memory"));
            }
            // SAFETY: the range is valid, as the caller promised.
            Place::Pageable => Source::Taken(unsafe { std::slice::from_raw_parts(src, bytes) }.into()),
        };
        state.submit(CALL, Op::Upload { dst: dst.0, src, bytes })
    }

    unsafe fn copy_to_host(&self, dst: *mut u8, src: DevPtr, bytes: usize) -> Result<()> {
        const CALL: &str = "copy_to_host";
        let mut state = self.state.lock();
        state.enter(CALL)?;
        if bytes == 0 {
            return Ok(());
        }
        match state.pinned.place(dst as usize, bytes).map_err(|detail| refused(CALL, detail))? {
            Place::Pinned(Pinned::Readback) => {}
            Place::Pinned(Pinned::Upload) => {
                return Err(refused(CALL, "the destination is write-combined memory, made for uploads"));
            }
            Place::Pageable => return Err(refused(CALL, "the destination is not page-locked")),
        }
        state.submit(CALL, Op::Readback { dst: dst as usize, src: src.0, bytes })
    }

    unsafe fn fill(&self, dst: DevPtr, value: u8, bytes: usize) -> Result<()> {
        const CALL: &str = "fill";
        let mut state = self.state.lock();
        state.enter(CALL)?;
        if bytes == 0 {
            return Ok(());
        }
        state.submit(CALL, Op::Fill { dst: dst.0, value, bytes })
    }

    unsafe fn launch(
        &self,
        kernel: &'static Kernel,
        config: LaunchConfig,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let mut state = self.state.lock();
        state.enter(kernel.name)?;
        self.check_launch(kernel, config, arguments.len())?;
        let copy = |(&ptr, &size): (&*mut c_void, &usize)| {
            // SAFETY: one value of this size per parameter, as the caller promised.
            argument(unsafe { std::slice::from_raw_parts(ptr.cast::<u8>(), size) })
        };
        let arguments = arguments.iter().zip(kernel.parameter_sizes).map(copy).collect();
        let launch = Op::Launch(Arc::new(Launch { kernel, config, arguments }));
        Self::submit_launch(&mut state, kernel.name, launch)
    }

    fn create_event(&self) -> Result<EventId> {
        let mut state = self.state.lock();
        state.enter_outside_capture("create_event")?;
        let id = state.next_id();
        state.events.insert(id, Event::default());
        Ok(EventId(id))
    }

    fn record(&self, event: EventId) -> Result<()> {
        let mut state = self.state.lock();
        state.enter_outside_capture("record")?;
        state.record(event.0)
    }

    fn wait(&self, event: EventId) -> Result<()> {
        let mut state = self.state.lock();
        state.enter_outside_capture("wait")?;
        state.wait(event.0)
    }

    fn is_reached(&self, event: EventId) -> Result<bool> {
        let mut state = self.state.lock();
        state.enter_outside_capture("is_reached")?;
        state.is_reached(event.0)
    }

    fn elapsed_ms(&self, start: EventId, end: EventId) -> Result<f32> {
        let mut state = self.state.lock();
        state.enter_outside_capture("elapsed")?;
        state.elapsed_ms(start.0, end.0)
    }

    unsafe fn destroy_event(&self, event: EventId) {
        let mut state = self.state.lock();
        if state.events.remove(&event.0).is_none() {
            state.mistake("destroy_event", "no such event (destroyed twice?)");
        }
    }

    fn begin_capture(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.enter_outside_capture("begin_capture")?;
        state.capture = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<GraphId> {
        const CALL: &str = "end_capture";
        let mut state = self.state.lock();
        state.enter(CALL)?;
        let Some(ops) = state.capture.take() else {
            return Err(refused(CALL, "no capture has begun"));
        };
        let id = state.next_id();
        state.graphs.insert(id, ops.into());
        Ok(GraphId(id))
    }

    unsafe fn launch_graph(&self, graph: GraphId) -> Result<()> {
        const CALL: &str = "launch_graph";
        let mut state = self.state.lock();
        state.enter_outside_capture(CALL)?;
        let Some(ops) = state.graphs.get(&graph.0).cloned() else {
            return Err(refused(CALL, "no such graph"));
        };
        for (address, bytes) in ops.iter().filter_map(Op::device_range) {
            state.device.check(address, bytes).map_err(|detail| refused(CALL, detail))?;
        }
        for (address, bytes) in ops.iter().filter_map(Op::host_range) {
            if !matches!(state.pinned.place(address, bytes), Ok(Place::Pinned(_))) {
                return Err(refused(CALL, "page-locked memory that it uses was freed"));
            }
        }
        Self::submit_launch(&mut state, CALL, Op::Graph(ops))
    }

    unsafe fn destroy_graph(&self, graph: GraphId) {
        const CALL: &str = "destroy_graph";
        let mut state = self.state.lock();
        match state.graphs.remove(&graph.0) {
            None => state.mistake(CALL, "no such graph (destroyed twice?)"),
            Some(ops) if state.graph_in_use(&ops) => state.mistake(CALL, "it is queued and has not run"),
            Some(_) => {}
        }
    }

    fn synchronize(&self) -> Result<()> {
        const CALL: &str = "synchronize";
        let mut state = self.state.lock();
        state.enter_outside_capture(CALL)?;
        state.run_all(CALL)?;
        // A free that has just run may have found something.
        state.enter(CALL)
    }
}
