//! A driver without a GPU: executes the same `.cu` files on the CPU, one fiber per CUDA thread.
//!
//! Device memory ends at a guard page and starts out as NaN. A launch runs under a [`Schedule`]; a kernel that is right gives the same
//! result under each of them.

mod driver;
mod runtime;

pub use driver::EmuDriver;
pub use runtime::{Schedule, Stats, parameter_sizes};
