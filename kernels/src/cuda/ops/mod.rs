//! One file per op: its kernels' signatures, and a function that checks the contract of the `.cu` file's header and launches.

mod probe;
mod rmsnorm;

pub use probe::{probe_copy_bandwidth, probe_read_bandwidth, probe_sums};
pub use rmsnorm::{RmsNorm, rmsnorm};

use super::driver::Kernel;

/// The kernels of all files.
pub(super) static TABLES: &[&[Kernel]] = &[probe::KERNELS, rmsnorm::KERNELS];
