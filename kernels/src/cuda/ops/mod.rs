//! One file per op: its kernels' signatures, and a function that checks the contract of the `.cu` file's header and launches.

mod attention;
mod paged_kv;
mod rmsnorm;
mod rope_kv_write;

pub use attention::{
    Attention, AttentionKernels, AttentionWorkspace, PlanLimits, Scoring, attention, attention_plan,
};
pub use paged_kv::{KvLayer, kv_cache_elems};
pub use rmsnorm::{RmsNorm, rmsnorm};
pub use rope_kv_write::{HeadNorm, PADDING_SLOT, RopeKvWrite, Rotary, rope_kv_write};

use super::driver::Kernel;

/// The kernels of all files.
pub(super) static TABLES: &[&[Kernel]] = &[attention::KERNELS, rmsnorm::KERNELS, rope_kv_write::KERNELS];
