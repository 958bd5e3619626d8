//! One file per op: its kernels' signatures, and a function that checks the contract of the `.cu` file's header and launches.

mod rmsnorm;

pub use rmsnorm::{RmsNorm, rmsnorm};

use super::driver::Kernel;

/// The kernels of all files.
pub(super) static TABLES: &[&[Kernel]] = &[rmsnorm::KERNELS];
