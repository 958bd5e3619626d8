//! A driver without a GPU: executes the same `.cu` files on the CPU, one fiber per CUDA thread.
//!
//! Device memory ends at a guard page and starts out as NaN. A launch runs under a [`Schedule`]; a kernel that is right gives
//! the same result under each of them, and has no race on shared memory under any.

mod config;
mod driver;
mod memory;
mod runtime;
mod schedule;
mod state;
mod stream;

pub use config::{EmuConfig, Failure, Live};
pub use driver::EmuDriver;
pub use runtime::{Site, SiteKind, Stats, Tensor, TensorMap, parameter_sizes, tensor_map};
pub use schedule::{Asynchronous, Order, Schedule};
