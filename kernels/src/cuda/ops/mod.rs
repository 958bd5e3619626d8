//! One file per op: its kernels' signatures, and a function that checks the contract of the `.cu` file's header and launches.

mod activation;
mod attention;
mod copy_blocks;
mod embedding;
mod gather_rows;
mod layernorm;
mod linear;
mod moe;
mod paged_kv;
mod probe;
mod rmsnorm;
mod rope_kv_write;
mod sampling;

pub use activation::{Activation, ActivationKind, activation};
pub use attention::{
    Attention, AttentionKernels, AttentionWorkspace, PlanLimits, Scoring, attention, attention_plan,
    check_model,
};
pub use copy_blocks::{CopyBlocks, copy_blocks};
pub use embedding::{Embedding, embedding};
pub use gather_rows::{GatherRows, PADDING_INDEX, gather_rows};
pub use layernorm::{LayerNorm, layernorm};
pub use linear::{Linear, LinearEpilogue, LinearKernel, linear, linear_with};
pub use moe::{
    MoeCombine, MoeLinear, MoeOrder, MoePermute, MoeRoute, MoeRows, MoeShape, moe_combine, moe_linear,
    moe_permute, moe_route,
};
pub use paged_kv::{KvLayer, kv_cache_elems};
pub use probe::{probe_copy_bandwidth, probe_read_bandwidth, probe_sums};
pub use rmsnorm::{RmsNorm, rmsnorm};
pub use rope_kv_write::{HeadNorm, PADDING_SLOT, RopeKvWrite, Rotary, rope_kv_write};
pub use sampling::{
    BlockShape, Encoded, MAX_TOP, Needs, RESULT_WORDS, Sample, Sampler, decode_results, encode, is_masked,
    list_words, mask_words, sample,
};

use super::driver::Kernel;

/// The kernels of all files.
pub(super) static TABLES: &[&[Kernel]] = &[
    activation::KERNELS,
    attention::KERNELS,
    embedding::KERNELS,
    gather_rows::KERNELS,
    layernorm::KERNELS,
    linear::SKINNY_KERNELS,
    linear::SKINNY_QUANTIZED_KERNELS,
    linear::TILED_KERNELS,
    linear::TILED_QUANTIZED_KERNELS,
    moe::COMBINE_KERNELS,
    moe::PERMUTE_KERNELS,
    moe::ROUTE_KERNELS,
    probe::KERNELS,
    rmsnorm::KERNELS,
    rope_kv_write::KERNELS,
    sampling::CHOICE_KERNELS,
    sampling::LOGPROB_KERNELS,
];
