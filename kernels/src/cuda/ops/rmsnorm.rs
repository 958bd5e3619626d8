//! `rmsnorm.cu`.

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
    file "rmsnorm";
    /// One block per row.
    fn rmsnorm_bf16(out: DevPtr, x: DevPtr, residual: DevPtr, weight: DevPtr, width: i32, eps: f32);
}

const OP: &str = "rmsnorm";
const THREADS: u32 = 256;

/// Arguments of [`rmsnorm`]. Letters as in [`crate::ops`].
pub struct RmsNorm<'a> {
    /// `[rows, H]` bf16, written.
    pub out: &'a mut DeviceBuffer,
    /// `[rows, H]` bf16.
    pub x: &'a DeviceBuffer,
    /// `[rows, H]` bf16: `x` is added to it, and the sum is what is normalised.
    pub residual: Option<&'a mut DeviceBuffer>,
    /// `[H]` f32.
    pub weight: &'a DeviceBuffer,
    /// H, a multiple of 8.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// Rows; 0 does nothing.
    pub rows: usize,
}

/// Queues the norm; see [`crate::Ops::rmsnorm`].
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn rmsnorm(device: &Device, call: RmsNorm<'_>) -> Result<()> {
    let RmsNorm { out, x, residual, weight, width, eps, rows } = call;
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
    let config = LaunchConfig::linear(rows, THREADS);
    // SAFETY: the extents of all buffers were checked above.
    unsafe { rmsnorm_bf16(device.driver(), config, out, x, residual, weight, width as i32, eps) }
}
