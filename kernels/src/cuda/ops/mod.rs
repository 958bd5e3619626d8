//! One file per op: its kernels' signatures, and a function that checks the contract of the `.cu` file's header and launches.

mod probe;
mod rmsnorm;

pub use probe::{probe_copy_bandwidth, probe_read_bandwidth, probe_sums};
mod activation;
mod embedding;
mod gather_rows;
mod layernorm;

pub use activation::{Activation, ActivationKind, activation};
pub use embedding::{Embedding, FEEDBACK, embedding};
pub use gather_rows::{GatherRows, PADDING_INDEX, gather_rows};
pub use layernorm::{LayerNorm, layernorm};
pub use rmsnorm::{RmsNorm, rmsnorm};

use super::driver::Kernel;

/// The kernels of all files.
pub(super) static TABLES: &[&[Kernel]] = &[activation::KERNELS, embedding::KERNELS, gather_rows::KERNELS, layernorm::KERNELS, probe::KERNELS, rmsnorm::KERNELS];
