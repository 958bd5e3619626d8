//! The C++ run-time's interface: `runtime/launch.h` declares the same.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    fmt, ptr,
};

use tidemill_kernels::cuda::driver::{DevPtr, LaunchConfig};

use crate::schedule::{Asynchronous, Order, Schedule};

/// What the last launch did.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Changes from one fiber to another.
    pub switches: u64,
    /// Lanes that came to a warp collective.
    pub collectives: u64,
    /// Threads that came to a block's barrier.
    pub barriers: u64,
    /// Phases of `ldmatrix`: groups of eight rows.
    pub ldmatrix_phases: u64,
    /// Bank conflicts in them: extra passes over shared memory.
    pub ldmatrix_conflicts: u64,
    /// Phases of `load_shared*` and `store_shared*`: groups of lanes that together move at most 128 bytes.
    pub shared_phases: u64,
    /// Bank conflicts in them: extra passes over shared memory.
    pub shared_conflicts: u64,
}

/// What a [`Site`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SiteKind {
    /// `__syncthreads`.
    SyncThreads,
    /// `__syncwarp`.
    SyncWarp,
    /// `named_barrier`.
    NamedBarrier,
    /// `cp_async_wait`.
    CopyWait,
    /// A wait for an mbarrier.
    MbarrierWait,
    /// A wait for wgmma groups.
    WgmmaWait,
    /// A barrier of a cluster.
    ClusterSync,
}

impl SiteKind {
    /// In the order of the run-time's numbers.
    const ALL: [SiteKind; 7] = [
        SiteKind::SyncThreads,
        SiteKind::SyncWarp,
        SiteKind::NamedBarrier,
        SiteKind::CopyWait,
        SiteKind::MbarrierWait,
        SiteKind::WgmmaWait,
        SiteKind::ClusterSync,
    ];
}

/// A place in a kernel's source that orders threads or asynchronous operations.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// The file, as the compiler was given it.
    pub file: String,
    /// The line; two of one kind on a line are one site.
    pub line: u32,
    /// What it does.
    pub kind: SiteKind,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.file.rsplit('/').next().unwrap_or(&self.file);
        write!(f, "{name}:{} {:?}", self.line, self.kind)
    }
}

/// Parts of a launch that no kernel sees: how it runs and what a test wants of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How<'a> {
    pub(crate) schedule: Schedule,
    pub(crate) cluster: u32,
    pub(crate) shared_skew: u32,
    pub(crate) skip: Option<&'a Site>,
}

/// What a launch did.
pub(crate) struct Outcome {
    pub(crate) result: Result<(), String>,
    pub(crate) stats: Stats,
    pub(crate) sites: Vec<Site>,
}

#[repr(C)]
struct Config {
    order: c_int,
    asynchronous: c_int,
    seed: u64,
    threads: c_uint,
    cluster: c_uint,
    shared_skew: c_uint,
    skip_file: *const c_char,
    skip_line: c_int,
    skip_kind: c_int,
}

#[repr(C)]
struct Request {
    kernel: *const c_char,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    arguments: *mut *mut c_void,
    num_arguments: c_uint,
    config: Config,
}

#[repr(C)]
struct Report {
    stats: Stats,
    error: *mut c_char,
    error_bytes: usize,
    on_site: unsafe extern "C" fn(*mut c_void, c_int, *const c_char, c_int),
    context: *mut c_void,
}

/// A tensor in device memory that TMA loads boxes of; `emu_tensor` in the run-time.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Where it begins, 16-byte aligned.
    pub base: DevPtr,
    /// Dimensions in use.
    pub rank: u32,
    /// Size of an element.
    pub element_bytes: u32,
    /// Swizzle of the tile in shared memory: 0, 32, 64 or 128 bytes.
    pub swizzle_bytes: u32,
    /// Extents, the innermost first.
    pub extent: [u64; 5],
    /// Strides of all dimensions but the innermost.
    pub stride_bytes: [u64; 4],
    /// Extents of the box.
    pub r#box: [u32; 5],
}

/// What a kernel takes as its `TensorMap` parameter; `None` for what `cuTensorMapEncodeTiled` would refuse.
pub fn tensor_map(tensor: &Tensor) -> Option<TensorMap> {
    let mut map = TensorMap([0; 16]);
    // SAFETY: the map has 128 bytes.
    (unsafe { emu_tensor_map(map.0.as_mut_ptr().cast(), tensor) } == 0).then_some(map)
}

/// The 128 opaque bytes of a tensor map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct TensorMap([u64; 16]);

unsafe extern "C" {
    fn emu_tensor_map(map: *mut c_void, tensor: *const Tensor) -> c_int;
    fn emu_launch(request: *const Request, report: *mut Report) -> c_int;
    fn emu_kernel_parameters(name: *const c_char, sizes: *mut c_uint, capacity: c_uint) -> c_int;
    fn emu_alloc(bytes: usize) -> *mut c_void;
    fn emu_free(ptr: *mut c_void) -> c_int;
}

/// Appends a site to the vector of [`Site`] behind `context`.
unsafe extern "C" fn note_site(context: *mut c_void, kind: c_int, file: *const c_char, line: c_int) {
    // SAFETY: `launch` passes its vector, which nobody else uses during the call.
    let sites = unsafe { &mut *context.cast::<Vec<Site>>() };
    // SAFETY: the run-time passes a C string.
    let file = unsafe { CStr::from_ptr(file) }.to_string_lossy().into_owned();
    sites.push(Site { file, line: line.unsigned_abs(), kind: SiteKind::ALL[kind.unsigned_abs() as usize] });
}

/// Runs a kernel to its end.
///
/// # Safety
/// As `cuLaunchKernel`.
pub(crate) unsafe fn launch(
    name: &str,
    launch: LaunchConfig,
    arguments: &mut [*mut c_void],
    how: How<'_>,
) -> Outcome {
    let name = CString::new(name).expect("kernel names hold no NUL");
    let skip_file = how.skip.map(|site| CString::new(site.file.as_str()).expect("paths hold no NUL"));
    let config = Config {
        order: match how.schedule.order {
            Order::Forward => 0,
            Order::Reverse => 1,
            Order::Random => 2,
            Order::Priority => 3,
        },
        asynchronous: match how.schedule.asynchronous {
            Asynchronous::AtOnce => 0,
            Asynchronous::Late => 1,
            Asynchronous::Random => 2,
        },
        seed: how.schedule.seed,
        threads: how.schedule.threads,
        cluster: how.cluster,
        shared_skew: how.shared_skew,
        skip_file: skip_file.as_ref().map_or(ptr::null(), |file| file.as_ptr()),
        skip_line: how.skip.map_or(0, |site| site.line as c_int),
        skip_kind: how.skip.map_or(0, |site| site.kind as c_int),
    };
    let request = Request {
        kernel: name.as_ptr(),
        grid: launch.grid,
        block: launch.block,
        shared_bytes: launch.shared_bytes,
        arguments: arguments.as_mut_ptr(),
        num_arguments: arguments.len() as c_uint,
        config,
    };
    let mut error = vec![0_u8; 8192];
    let mut sites: Vec<Site> = Vec::new();
    let mut report = Report {
        stats: Stats::default(),
        error: error.as_mut_ptr().cast(),
        error_bytes: error.len(),
        on_site: note_site,
        context: (&raw mut sites).cast(),
    };
    // SAFETY: all pointers live through the call; the arguments are the caller's promise.
    let status = unsafe { emu_launch(&request, &mut report) };
    let stats = report.stats;
    let result = if status == 0 {
        Ok(())
    } else {
        let text = CStr::from_bytes_until_nul(&error).map(CStr::to_string_lossy).unwrap_or_default();
        Err(text.into_owned())
    };
    Outcome { result, stats, sites }
}

/// Sizes of a compiled kernel's parameters; `None` when there is no such kernel.
pub fn parameter_sizes(name: &str) -> Option<Vec<usize>> {
    const MOST: usize = 64;
    let name = CString::new(name).ok()?;
    let mut sizes = [0; MOST];
    // SAFETY: the array has room for the number given.
    let count = unsafe { emu_kernel_parameters(name.as_ptr(), sizes.as_mut_ptr(), MOST as c_uint) };
    let count = usize::try_from(count).ok()?;
    Some(sizes[..count].iter().map(|&size| size as usize).collect())
}

/// "Device" memory: 16-byte aligned, ends at a guard page, filled with NaN. Null when there is none.
pub(crate) fn alloc(bytes: usize) -> *mut u8 {
    // SAFETY: has no preconditions.
    unsafe { emu_alloc(bytes) }.cast()
}

/// Frees what [`alloc`] gave; false when bytes just beyond its end were overwritten.
///
/// # Safety
/// `ptr` came from `alloc` and is freed once.
pub(crate) unsafe fn free(ptr: *mut u8) -> bool {
    // SAFETY: the caller's promise.
    unsafe { emu_free(ptr.cast()) == 1 }
}
