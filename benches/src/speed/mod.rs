//! Kernels and whole models of real size beside the limits of the machine, without files: weights are random.
//!
//! Everything is written against [`tidemill_kernels::Ops`], so one code measures GPU and CPU, and runs on the emulator.
//!
//! - [`machine`], [`cuda`]: what is measured on; [`clock`]: how time is taken; [`limits`]: what the machine could do at best.
//! - [`random`]: tensors of random numbers; [`steps`]: metadata of steps.
//! - [`kernels`]: one op at a time, at the [`shapes`], and [`experts`]; [`model`]: whole steps; [`loop_cost`]: what the engine's loop adds to them.
//! - [`table`]: how results are printed and written.

pub mod clock;
pub mod cuda;
pub mod experts;
pub mod kernels;
pub mod limits;
pub mod loop_cost;
pub mod machine;
pub mod model;
mod products;
pub mod random;
pub mod shapes;
pub mod steps;
pub mod table;

/// What ends a benchmark early.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
