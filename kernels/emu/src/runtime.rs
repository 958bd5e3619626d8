//! The C++ run-time's interface.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

/// In which order threads and asynchronous copies run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Schedule {
    /// 0: threads in order; 1: in reverse; 2: at random from `seed`.
    pub order: i32,
    /// For random orders.
    pub seed: u64,
    /// Asynchronous operations complete 0: at once; 1: as late as allowed; 2: at random.
    pub asynchronous: i32,
    /// Host threads that run blocks; 0: one per core.
    pub threads: i32,
}

impl Schedule {
    /// The four that every kernel test runs under.
    pub fn all() -> [Schedule; 4] {
        let schedule = |order, seed, asynchronous| Schedule { order, seed, asynchronous, threads: 0 };
        [schedule(0, 0, 0), schedule(1, 0, 1), schedule(2, 1, 2), schedule(2, 2, 1)]
    }
}

/// What the last launch did.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Changes from one fiber to another.
    pub switches: u64,
    /// Warp collectives.
    pub collectives: u64,
    /// Block barriers.
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

#[repr(C)]
struct Config {
    order: c_int,
    seed: u64,
    asynchronous: c_int,
    threads: c_int,
    resident: c_int,
    shared_skew: c_uint,
}

unsafe extern "C" {
    fn emu_launch(
        name: *const c_char,
        grid: *const c_uint,
        block: *const c_uint,
        shared: c_uint,
        arguments: *mut *mut c_void,
        num_arguments: c_uint,
        config: *const Config,
        error: *mut c_char,
        error_len: usize,
    ) -> c_int;
    fn emu_kernel_args(name: *const c_char, sizes: *mut c_uint, cap: c_uint) -> c_int;
    fn emu_last_stats(stats: *mut Stats);
    fn emu_alloc(bytes: usize) -> *mut c_void;
    fn emu_free(ptr: *mut c_void);
}

/// Runs a kernel to its end.
///
/// # Safety
/// As `cuLaunchKernel`.
pub(crate) unsafe fn launch(
    name: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    arguments: &mut [*mut c_void],
    schedule: Schedule,
) -> Result<(), String> {
    let name = CString::new(name).expect("kernel names hold no NUL");
    let config = Config {
        order: schedule.order,
        seed: schedule.seed,
        asynchronous: schedule.asynchronous,
        threads: schedule.threads,
        resident: 0,
        shared_skew: 0,
    };
    let mut error = vec![0_u8; 8192];
    // SAFETY: all pointers live through the call; the arguments are the caller's promise.
    let status = unsafe {
        emu_launch(
            name.as_ptr(),
            grid.as_ptr(),
            block.as_ptr(),
            shared,
            arguments.as_mut_ptr(),
            arguments.len() as u32,
            &config,
            error.as_mut_ptr().cast(),
            error.len(),
        )
    };
    if status == 0 {
        return Ok(());
    }
    let text = CStr::from_bytes_until_nul(&error).map(CStr::to_string_lossy).unwrap_or_default();
    Err(text.into_owned())
}

/// Sizes of a compiled kernel's parameters; `None` when there is no such kernel.
pub fn parameter_sizes(name: &str) -> Option<Vec<usize>> {
    let name = CString::new(name).ok()?;
    let mut sizes = [0; 64];
    // SAFETY: the array has room for the number given.
    let count = unsafe { emu_kernel_args(name.as_ptr(), sizes.as_mut_ptr(), 64) };
    let count = usize::try_from(count).ok()?;
    Some(sizes[..count].iter().map(|&size| size as usize).collect())
}

/// Statistics of the last launch.
pub(crate) fn last_stats() -> Stats {
    let mut stats = Stats::default();
    // SAFETY: writes one struct of this layout.
    unsafe { emu_last_stats(&mut stats) };
    stats
}

/// "Device" memory: 16-byte aligned, ends at a guard page, filled with NaN. Null when there is none.
pub(crate) fn alloc(bytes: usize) -> *mut u8 {
    // SAFETY: has no preconditions.
    unsafe { emu_alloc(bytes) }.cast()
}

/// Frees what [`alloc`] gave.
///
/// # Safety
/// `ptr` came from `alloc` and is freed once.
pub(crate) unsafe fn free(ptr: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { emu_free(ptr.cast()) }
}
