//! `moe_combine.cu`.

use crate::{
    DType,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::{DeviceBuffer, require_multiple},
        table::kernels,
    },
};

kernels! {
    file "moe_combine";
    /// Eight elements to a thread.
    fn moe_combine_bf16(out: DevPtr, rows: DevPtr, weights: DevPtr, k: i32, width: i32);
}

const OP: &str = "moe_combine";
const THREADS: u32 = 256;
/// Elements of a row that one block computes.
const BLOCK_WIDTH: usize = 2048;

/// Arguments of [`moe_combine`].
pub struct MoeCombine<'a> {
    /// `[T, H]` bf16, the residual stream, added to.
    pub out: &'a mut DeviceBuffer,
    /// `[T * k, H]` bf16: what the experts made of each token.
    pub rows: &'a DeviceBuffer,
    /// `[T, k]` f32.
    pub weights: &'a DeviceBuffer,
    /// H, a multiple of 8.
    pub width: usize,
    /// k.
    pub top_k: usize,
    /// T; 0 does nothing.
    pub tokens: usize,
}

/// Queues the weighted sum of each token's experts.
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn moe_combine(device: &Device, call: MoeCombine<'_>) -> Result<()> {
    let MoeCombine { out, rows, weights, width, top_k, tokens } = call;
    require_multiple(OP, "H", width, 8)?;
    require_multiple(OP, "k", top_k, 1)?;
    if tokens == 0 {
        return Ok(());
    }
    let out = out.at_least(OP, "out", DType::Bf16, tokens * width)?;
    let weights = weights.at_least(OP, "weights", DType::F32, tokens * top_k)?;
    let rows = rows.at_least(OP, "rows", DType::Bf16, tokens * top_k * width)?;
    let grid = [tokens as u32, width.div_ceil(BLOCK_WIDTH) as u32, 1];
    let config = LaunchConfig { grid, block: [THREADS, 1, 1], shared_bytes: 0 };
    // SAFETY: the extents of all buffers were checked above.
    unsafe { moe_combine_bf16(device.driver(), config, out, rows, weights, top_k as i32, width as i32) }
}
