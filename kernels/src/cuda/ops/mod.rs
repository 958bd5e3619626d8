//! One file per op: its kernels' signatures, and a function that checks the contract of the `.cu` file's header and launches.

mod activation;
mod embedding;
mod gather_rows;
mod layernorm;
mod linear;
mod moe;
mod rmsnorm;
mod sampling;

pub use activation::{Activation, ActivationKind, activation};
pub use embedding::{Embedding, FEEDBACK, embedding};
pub use gather_rows::{GatherRows, PADDING_INDEX, gather_rows};
pub use layernorm::{LayerNorm, layernorm};
pub use linear::{Linear, LinearEpilogue, LinearKernel, linear, linear_with};
pub use moe::{
    MoeCombine, MoeLinear, MoeOrder, MoePermute, MoeRoute, MoeRows, MoeShape, moe_combine, moe_linear,
    moe_permute, moe_route,
};
pub use rmsnorm::{RmsNorm, rmsnorm};
pub use sampling::{
    BlockShape, Encoded, MAX_TOP, Needs, RESULT_WORDS, Sample, Sampler, decode_results, encode, list_words,
    sample,
};

use super::driver::Kernel;

/// The kernels of all files.
pub(super) static TABLES: &[&[Kernel]] = &[
    activation::KERNELS,
    embedding::KERNELS,
    gather_rows::KERNELS,
    layernorm::KERNELS,
    linear::SKINNY_KERNELS,
    linear::TILED_KERNELS,
    moe::COMBINE_KERNELS,
    moe::PERMUTE_KERNELS,
    moe::ROUTE_KERNELS,
    rmsnorm::KERNELS,
    sampling::CHOICE_KERNELS,
    sampling::LOGPROB_KERNELS,
];
