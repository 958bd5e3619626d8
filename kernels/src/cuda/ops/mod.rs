//! One file per op: its kernels' signatures, and a function that checks the contract of the `.cu` file's header and launches.

mod activation;
mod add;
mod attention;
mod copy_blocks;
mod embedding;
mod gather_rows;
mod latent_attention;
mod latent_kv_write;
mod linear;
mod lora;
mod moe;
mod norm;
mod paged_kv;
mod probe;
mod rope_kv_write;
mod sampling;

pub use activation::{Activation, activation};
pub use add::{AddGated, add, add_gated};
pub use attention::{
    Attention, AttentionKernels, AttentionWorkspace, PlanKind, PlanLimits, PlanShape, attention,
    attention_plan, check_model,
};
pub use copy_blocks::{CopyBlocks, copy_blocks};
pub use embedding::{Embedding, EmbeddingAdd, embedding, embedding_add};
pub use gather_rows::{GatherRows, PADDING_INDEX, gather_rows};
pub use latent_attention::{LatentAttention, attend_latents, check_latent};
pub use latent_kv_write::{LatentKvWrite, write_latents};
pub use linear::{Linear, LinearEpilogue, LinearHeads, LinearKernel, linear, linear_heads, linear_with};
pub use lora::{LoraAdd, LoraMemory, LoraPlan, LoraRestore, lora_add, lora_restore};
pub use moe::{
    MoeCombine, MoeLinear, MoeOrder, MoePermute, MoeRoute, MoeRows, MoeShape, check_routing, moe_combine,
    moe_linear, moe_permute, moe_route,
};
pub use norm::{Norm, norm, whole_rows};
pub use paged_kv::{KvLayer, check_cache, kv_cache_elems};
pub use probe::{probe_copy_bandwidth, probe_read_bandwidth, probe_sums};
pub use rope_kv_write::{HeadNorm, PADDING_SLOT, RopeKvWrite, Rotary, rope_kv_write};
pub use sampling::{
    BlockShape, Encoded, MAX_TOP, Needs, RESULT_WORDS, Sample, Sampler, decode_results, encode, is_masked,
    list_words, mask_words, sample,
};

pub use crate::ops::Activation as ActivationKind;

use super::driver::Kernel;

/// The kernels of all files.
pub(super) static TABLES: &[&[Kernel]] = &[
    activation::KERNELS,
    add::KERNELS,
    attention::F8_KERNELS,
    attention::KERNELS,
    embedding::KERNELS,
    gather_rows::KERNELS,
    latent_attention::KERNELS,
    latent_kv_write::KERNELS,
    linear::SKINNY_KERNELS,
    linear::SKINNY_QUANTIZED_KERNELS,
    linear::TILED_KERNELS,
    linear::TILED_QUANTIZED_KERNELS,
    lora::KERNELS,
    moe::COMBINE_KERNELS,
    moe::PERMUTE_KERNELS,
    moe::ROUTE_KERNELS,
    probe::KERNELS,
    norm::LAYER_KERNELS,
    norm::RMS_KERNELS,
    rope_kv_write::KERNELS,
    sampling::CHOICE_KERNELS,
    sampling::LOGPROB_KERNELS,
];
