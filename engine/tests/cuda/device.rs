//! The device under test.

use std::{env, path::PathBuf, sync::Arc};

use tidemill_kernels::cuda::{
    driver::Driver,
    gpu::{self, GpuOptions},
};
use tidemill_kernels_emu::{EmuDriver, Schedule};

/// An emulator that runs kernels under `schedule`; or the GPU that `TIDEMILL_TEST_DEVICE=cuda:N` names, and nothing in its place when
/// it cannot be used.
pub fn driver(schedule: Schedule) -> Arc<dyn Driver> {
    let Ok(name) = env::var("TIDEMILL_TEST_DEVICE") else { return Arc::new(EmuDriver::new(schedule)) };
    let ordinal = name.strip_prefix("cuda:").and_then(|n| n.parse().ok());
    let ordinal = ordinal.unwrap_or_else(|| panic!("TIDEMILL_TEST_DEVICE is {name:?}, not cuda:N"));
    Arc::new(gpu::open(ordinal, &GpuOptions::default()).unwrap_or_else(|error| panic!("{name}: {error}")))
}

/// A folder of fixtures; looked for at run time, as the tests also run away from where they were built.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap()).join("tests/fixtures").join(name)
}
