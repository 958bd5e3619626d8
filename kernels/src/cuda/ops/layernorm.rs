//! `layernorm.cu`.

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
    file "layernorm";
    /// One block per row.
    fn layernorm_bf16(out: DevPtr, x: DevPtr, residual: DevPtr, weight: DevPtr, bias: DevPtr, width: i32, eps: f32);
}

const OP: &str = "layernorm";
const THREADS: u32 = 256;

/// Arguments of [`layernorm`]. Letters as in [`crate::ops`].
pub struct LayerNorm<'a> {
    /// `[rows, H]` bf16, written.
    pub out: &'a mut DeviceBuffer,
    /// `[rows, H]` bf16.
    pub x: &'a DeviceBuffer,
    /// `[rows, H]` bf16: `x` is added to it, and the sum is what is normalised.
    pub residual: Option<&'a mut DeviceBuffer>,
    /// `[H]` f32.
    pub weight: &'a DeviceBuffer,
    /// `[H]` f32, added at the end.
    pub bias: Option<&'a DeviceBuffer>,
    /// H, a multiple of 8.
    pub width: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Rows; 0 does nothing.
    pub rows: usize,
}

/// Queues `out = (v - mean(v)) / sqrt(variance(v) + eps) * weight + bias`, where `v` is the residual if given, else `x`.
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn layernorm(device: &Device, call: LayerNorm<'_>) -> Result<()> {
    let LayerNorm { out, x, residual, weight, bias, width, eps, rows } = call;
    require_multiple(OP, "H", width, 8)?;
    if rows == 0 {
        return Ok(());
    }
    let out = out.at_least(OP, "out", DType::Bf16, rows * width)?;
    let x = x.at_least(OP, "x", DType::Bf16, rows * width)?;
    let residual = match residual {
        Some(residual) => residual.at_least(OP, "residual", DType::Bf16, rows * width)?,
        None => DevPtr::NULL,
    };
    let weight = weight.at_least(OP, "weight", DType::F32, width)?;
    let bias = match bias {
        Some(bias) => bias.at_least(OP, "bias", DType::F32, width)?,
        None => DevPtr::NULL,
    };
    let config = LaunchConfig::linear(rows, THREADS);
    // SAFETY: the extents of all buffers were checked above.
    unsafe { layernorm_bf16(device.driver(), config, out, x, residual, weight, bias, width as i32, eps) }
}
