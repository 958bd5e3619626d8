//! `activation.cu`.

use crate::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::{DeviceBuffer, require_multiple},
        table::kernels,
    },
    ops::Activation as ActivationKind,
};

kernels! {
    file "activation";
    /// SiLU, gated.
    fn silu_mul_bf16(out: DevPtr, x: DevPtr, width: i32);
    /// GELU, gated.
    fn gelu_mul_bf16(out: DevPtr, x: DevPtr, width: i32);
    /// GELU's tanh approximation, gated.
    fn gelu_tanh_mul_bf16(out: DevPtr, x: DevPtr, width: i32);
    /// The positive part, gated.
    fn relu_mul_bf16(out: DevPtr, x: DevPtr, width: i32);
    /// Bounded and scaled SiLU, gated.
    fn swiglu_oai_mul_bf16(out: DevPtr, x: DevPtr, width: i32, alpha: f32, limit: f32);
    /// SiLU.
    fn silu_bf16(out: DevPtr, x: DevPtr, width: i32);
    /// GELU.
    fn gelu_bf16(out: DevPtr, x: DevPtr, width: i32);
    /// GELU's tanh approximation.
    fn gelu_tanh_bf16(out: DevPtr, x: DevPtr, width: i32);
    /// The positive part.
    fn relu_bf16(out: DevPtr, x: DevPtr, width: i32);
}

const OP: &str = "activation";
const THREADS: u32 = 256;
/// Elements of a row that one block computes.
const BLOCK_WIDTH: usize = 2048;

/// Arguments of [`activation`]. Letters as in [`crate::ops`].
pub struct Activation<'a> {
    /// `[rows, I]` bf16, written.
    pub out: &'a mut DeviceBuffer,
    /// `[rows, 2 I]` bf16, gates first, when `gated`; else `[rows, I]`.
    pub x: &'a DeviceBuffer,
    /// The function.
    pub kind: ActivationKind,
    /// Multiply with the second half of `x`'s row.
    pub gated: bool,
    /// I, a multiple of 8.
    pub width: usize,
    /// Rows; 0 does nothing.
    pub rows: usize,
}

/// Queues the activation: what [`crate::Ops::linear_gated`] fuses with its product.
///
/// # Errors
/// An activation that is gated alone, without its gate; a buffer that is smaller or of another type than the contract says; what the
/// driver reports.
pub fn activation(device: &Device, call: Activation<'_>) -> Result<()> {
    let Activation { out, x, kind, gated, width, rows } = call;
    require_multiple(OP, "I", width, 8)?;
    if rows == 0 {
        return Ok(());
    }
    let out = out.at_least(OP, "out", DType::Bf16, rows * width)?;
    let x = x.at_least(OP, "x", DType::Bf16, rows * width * if gated { 2 } else { 1 })?;
    let mut config = LaunchConfig::linear(rows, THREADS);
    config.grid[1] = width.div_ceil(BLOCK_WIDTH) as u32;
    let (driver, width) = (device.driver(), width as i32);
    // SAFETY: the extents of both buffers were checked above.
    unsafe {
        match (kind, gated) {
            (ActivationKind::Silu, true) => silu_mul_bf16(driver, config, out, x, width),
            (ActivationKind::Gelu, true) => gelu_mul_bf16(driver, config, out, x, width),
            (ActivationKind::GeluTanh, true) => gelu_tanh_mul_bf16(driver, config, out, x, width),
            (ActivationKind::Relu, true) => relu_mul_bf16(driver, config, out, x, width),
            (ActivationKind::SwigluOai { alpha, limit }, true) => {
                swiglu_oai_mul_bf16(driver, config, out, x, width, alpha, limit)
            }
            (ActivationKind::Silu, false) => silu_bf16(driver, config, out, x, width),
            (ActivationKind::Gelu, false) => gelu_bf16(driver, config, out, x, width),
            (ActivationKind::GeluTanh, false) => gelu_tanh_bf16(driver, config, out, x, width),
            (ActivationKind::Relu, false) => relu_bf16(driver, config, out, x, width),
            (ActivationKind::SwigluOai { .. }, false) => {
                Err(KernelError::Unsupported { op: OP, detail: "SwigluOai takes a gate".into() })
            }
        }
    }
}
