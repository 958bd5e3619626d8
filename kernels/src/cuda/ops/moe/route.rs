//! `moe_route.cu`.

use super::MoeShape;
use crate::{
    DType,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::DeviceBuffer,
        table::kernels,
        words::DeviceWords,
    },
};

kernels! {
    file "moe_route";
    /// One warp per token.
    fn moe_route_f32(
        ids: DevPtr, weights: DevPtr, logits: DevPtr, tokens: u32, experts: u32, k: u32, renormalize: u32,
    );
}

const OP: &str = "moe_route";
const THREADS: u32 = 128;
const TOKENS_PER_BLOCK: usize = 4;

/// Arguments of [`moe_route`].
pub struct MoeRoute<'a> {
    /// `[T, k]` written: the experts of each token, the likeliest first, the lowest id first among equals.
    pub ids: DeviceWords<'a>,
    /// `[T, k]` f32, written: their probabilities.
    pub weights: &'a mut DeviceBuffer,
    /// `[T, E]` f32.
    pub logits: &'a DeviceBuffer,
    /// E and k.
    pub shape: MoeShape,
    /// Make each token's weights add up to 1 (`norm_topk_prob` in checkpoints).
    pub renormalize: bool,
    /// T; 0 does nothing.
    pub tokens: usize,
}

/// Queues the routing: softmax over all experts, then the k likeliest (Fedus, Zoph and Shazeer 2021, eq. 1).
///
/// # Errors
/// More experts than the kernel takes; a buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn moe_route(device: &Device, call: MoeRoute<'_>) -> Result<()> {
    let MoeRoute { ids, weights, logits, shape, renormalize, tokens } = call;
    shape.check(OP)?;
    if tokens == 0 {
        return Ok(());
    }
    let ids = ids.at_least(OP, "ids", tokens * shape.top_k)?;
    let weights = weights.at_least(OP, "weights", DType::F32, tokens * shape.top_k)?;
    let logits = logits.at_least(OP, "logits", DType::F32, tokens * shape.experts)?;
    let config = LaunchConfig::linear(tokens.div_ceil(TOKENS_PER_BLOCK), THREADS);
    let (experts, k) = (shape.experts as u32, shape.top_k as u32);
    // SAFETY: the extents of all buffers were checked above, and the shape is within what a warp holds.
    unsafe {
        moe_route_f32(
            device.driver(),
            config,
            ids,
            weights,
            logits,
            tokens as u32,
            experts,
            k,
            u32::from(renormalize),
        )
    }
}
