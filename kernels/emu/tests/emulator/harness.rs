//! Runs the kernels of `kernels/emu/faults`.

use std::ffi::c_void;

use tidemill_kernels::{
    KernelError,
    cuda::driver::{DevPtr, Driver, Kernel, LaunchConfig, Pinned},
};
use tidemill_kernels_emu::{EmuConfig, EmuDriver, Schedule, Stats};

/// The parameters of most kernels: `int *out, const int *in, int n`.
pub const OUT_IN_N: &[usize] = &[8, 8, 4];

/// An entry of a kernel table.
pub fn kernel(name: &'static str, parameter_sizes: &'static [usize]) -> &'static Kernel {
    Box::leak(Box::new(Kernel { file: "faults", name, parameter_sizes }))
}

/// A launch of a kernel that takes `out`, `in` and `n`.
#[derive(Clone)]
pub struct Call {
    pub name: &'static str,
    pub grid: u32,
    pub block: u32,
    pub shared_bytes: u32,
    pub input: Vec<i32>,
    pub outputs: usize,
    pub n: i32,
    pub device: EmuConfig,
}

/// One block of 256 threads, 256 values in and out.
pub fn call(name: &'static str) -> Call {
    let input = (0..256).map(|i| 3 * i + 1).collect();
    let device = EmuConfig::default();
    Call { name, grid: 1, block: 256, shared_bytes: 0, input, outputs: 256, n: 0, device }
}

impl Call {
    /// Under a schedule; what it wrote (-1 where it wrote nothing), or the device's complaint.
    pub fn run(&self, schedule: Schedule) -> Result<Vec<i32>, String> {
        self.run_with_stats(schedule).map(|(values, _)| values)
    }

    /// As [`Call::run`].
    pub fn run_with_stats(&self, schedule: Schedule) -> Result<(Vec<i32>, Stats), String> {
        let driver = EmuDriver::with(EmuConfig { schedule, ..self.device.clone() });
        let out = driver.alloc(4 * self.outputs, "out").unwrap();
        let input = upload(&driver, &self.input);
        let config = LaunchConfig {
            grid: [self.grid, 1, 1],
            block: [self.block, 1, 1],
            shared_bytes: self.shared_bytes,
        };
        let result = launch(&driver, self.name, config, out, input, self.n)
            .and_then(|()| driver.synchronize())
            .map_err(|error| error.to_string())
            .map(|()| (download(&driver, out, self.outputs), driver.last_stats()));
        // SAFETY: allocated above, freed once.
        unsafe {
            driver.free(out);
            driver.free(input);
        }
        // What the ends of the allocations say.
        match (result, driver.synchronize()) {
            (Ok(_), Err(error)) => Err(error.to_string()),
            (result, _) => result,
        }
    }

    /// Under each of the four schedules.
    pub fn run_all(&self) -> Vec<Result<Vec<i32>, String>> {
        Schedule::all().into_iter().map(|schedule| self.run(schedule)).collect()
    }

    /// Requires a complaint with these words under every schedule.
    #[track_caller]
    pub fn complains(&self, words: &str) {
        for (schedule, result) in Schedule::all().into_iter().zip(self.run_all()) {
            let complaint = result.expect_err("must be reported");
            assert!(complaint.contains(words), "{} under {schedule:?}: {complaint}", self.name);
        }
    }

    /// Requires these values under every schedule.
    #[track_caller]
    pub fn gives(&self, values: &[i32]) {
        for result in self.run_all() {
            assert_eq!(result.as_deref(), Ok(values), "{}", self.name);
        }
    }
}

/// Launches a kernel of `out`, `in`, `n`.
pub fn launch(
    driver: &EmuDriver,
    name: &'static str,
    config: LaunchConfig,
    mut out: DevPtr,
    mut input: DevPtr,
    mut n: i32,
) -> Result<(), KernelError> {
    let mut arguments: [*mut c_void; 3] =
        [(&raw mut out).cast(), (&raw mut input).cast(), (&raw mut n).cast()];
    // SAFETY: the kernel has these parameters; a bad address is what the emulator must report.
    unsafe { driver.launch(kernel(name, OUT_IN_N), config, &mut arguments) }
}

/// Device memory that holds `values`.
pub fn upload<T: Copy>(driver: &EmuDriver, values: &[T]) -> DevPtr {
    let ptr = driver.alloc(size_of_val(values), "in").unwrap();
    // SAFETY: both have this size.
    unsafe { driver.copy_to_device(ptr, values.as_ptr().cast(), size_of_val(values)) }.unwrap();
    ptr
}

/// `count` values of device memory.
pub fn download<T: Copy + Default>(driver: &EmuDriver, ptr: DevPtr, count: usize) -> Vec<T> {
    let mut values = vec![T::default(); count];
    let bytes = size_of_val(values.as_slice());
    let staging = driver.alloc_pinned(bytes, Pinned::Readback).unwrap();
    // SAFETY: all have this size, and the staging memory lives until the synchronisation.
    unsafe {
        driver.copy_to_host(staging, ptr, bytes).unwrap();
        driver.synchronize().unwrap();
        std::ptr::copy_nonoverlapping(staging, values.as_mut_ptr().cast(), bytes);
        driver.free_pinned(staging);
    }
    values
}
