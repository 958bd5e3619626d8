//! A product per head: the grouped kernels, with as many rows for each.

use super::{Grouping, LinearArgs, LinearEpilogue, LinearKernel, Operands, launch};
use crate::cuda::{Device, driver::Result, matrix::ProductWeight, memory::DeviceBuffer};

const OP: &str = "linear_heads";

/// Arguments of [`linear_heads`].
pub struct LinearHeads<'a> {
    /// `[rows, X, N]` bf16, written.
    pub out: &'a mut DeviceBuffer,
    /// `[rows, X, K]` bf16.
    pub x: &'a DeviceBuffer,
    /// `[X, N, K]`.
    pub weight: &'a dyn ProductWeight,
    /// `[X, N]` f32 or bf16.
    pub bias: Option<&'a DeviceBuffer>,
    /// Rows; 0 does nothing.
    pub rows: usize,
    /// X.
    pub heads: usize,
    /// N.
    pub n: usize,
    /// K, a multiple of 8; of 32 for a quantised weight.
    pub k: usize,
}

/// Queues `out[r, h, :] = weight[h] · x[r, h, :] + bias[h]`, to the bits of [`super::linear`]; see [`crate::Ops::linear_heads`].
///
/// # Errors
/// As [`super::linear`].
pub fn linear_heads(device: &Device, call: LinearHeads<'_>) -> Result<()> {
    let LinearHeads { out, x, weight, bias, rows, heads, n, k } = call;
    let (pairs, epilogue) = (rows * heads, LinearEpilogue::Store);
    let operands = Operands {
        op: OP,
        out,
        out_rows: pairs,
        x,
        x_rows: pairs,
        weight,
        bias,
        experts: heads,
        n,
        k,
        epilogue,
    };
    let args = operands.check()?;
    if pairs == 0 {
        return Ok(());
    }
    let args = LinearArgs { rows: rows as u32, divisor: heads as u32, ..args };
    let kernel = LinearKernel::choose(rows, args.tile_rows() * heads, device.driver().info().num_sms);
    launch(device, kernel, Grouping::Experts, heads * rows.div_ceil(kernel.tokens()), args)
}
