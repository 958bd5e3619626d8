//! Matrix products with a resident weight.
//!
//! - [`kernel`]: the kernels there are, and which one suits a shape. All give the same bits (`linear.cuh`).
//! - [`arguments`]: the checks at the door, and the kernels' common argument.
//! - `skinny`, `tiled`, and the same for quantised weights: the tables of the four files.
//! - `heads`: a product per head.

mod arguments;
mod heads;
mod kernel;
mod skinny;
mod skinny_quantized;
mod tiled;
mod tiled_quantized;

pub(super) use arguments::{Grouping, LinearArgs, Operands};
pub(super) use skinny::KERNELS as SKINNY_KERNELS;
pub(super) use skinny_quantized::KERNELS as SKINNY_QUANTIZED_KERNELS;
pub(super) use tiled::KERNELS as TILED_KERNELS;
pub(super) use tiled_quantized::KERNELS as TILED_QUANTIZED_KERNELS;

pub use arguments::LinearEpilogue;
pub use heads::{LinearHeads, linear_heads};
pub use kernel::LinearKernel;

use crate::cuda::{Device, driver::Result, matrix::ProductWeight, memory::DeviceBuffer};

const OP: &str = "linear";

/// Arguments of [`linear`].
pub struct Linear<'a> {
    /// `[rows, N]` bf16 or f32, written.
    pub out: &'a mut DeviceBuffer,
    /// `[rows, K]` bf16.
    pub x: &'a DeviceBuffer,
    /// `[N, K]`; `[2 N, K]`, gate rows first, when the epilogue is gated.
    pub weight: &'a dyn ProductWeight,
    /// `[N]` or `[2 N]`, as many as the weight has rows; f32 or bf16.
    pub bias: Option<&'a DeviceBuffer>,
    /// Rows; 0 does nothing.
    pub rows: usize,
    /// N, the width of `out`.
    pub n: usize,
    /// K, a multiple of 8; of 32 for a quantised weight.
    pub k: usize,
    /// What happens to the product.
    pub epilogue: LinearEpilogue,
}

/// Queues `out = epilogue(x · weightᵀ + bias)`; see [`crate::Ops::linear`].
///
/// A row of `out` has the same bits whatever the other rows are and however many there are.
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; extents beyond the kernels' index range; what the driver
/// reports.
pub fn linear(device: &Device, call: Linear<'_>) -> Result<()> {
    let kernel =
        LinearKernel::choose(call.rows, call.epilogue.tile_rows(call.n), device.driver().info().num_sms);
    linear_with(device, kernel, call)
}

/// [`linear`] with a kernel of the caller's choice: the same bits, at another speed. For tests and measurements.
///
/// # Errors
/// As [`linear`].
pub fn linear_with(device: &Device, kernel: LinearKernel, call: Linear<'_>) -> Result<()> {
    let Linear { out, x, weight, bias, rows, n, k, epilogue } = call;
    let operands =
        Operands { op: OP, out, out_rows: rows, x, x_rows: rows, weight, bias, experts: 1, n, k, epilogue };
    let args = operands.check()?;
    if rows == 0 {
        return Ok(());
    }
    let args = LinearArgs { rows: rows as u32, ..args };
    launch(device, kernel, Grouping::Dense, rows.div_ceil(kernel.tokens()), args)
}

/// Queues a product whose arguments were checked, over `token_tiles` tiles of `kernel.tokens()` rows.
pub(super) fn launch(
    device: &Device,
    kernel: LinearKernel,
    grouping: Grouping,
    token_tiles: usize,
    args: LinearArgs,
) -> Result<()> {
    let bits = args.bits();
    let kernel = if bits == 16 { kernel } else { kernel.quantized() };
    let grid = [token_tiles, args.tile_rows().div_ceil(kernel.weight_rows())];
    match (kernel.is_tiled(), bits) {
        (false, 16) => skinny::launch(device.driver(), kernel, grouping, grid, args),
        (true, 16) => tiled::launch(device.driver(), kernel, grouping, grid, args),
        (false, _) => skinny_quantized::launch(device.driver(), kernel, grouping, grid, args),
        (true, _) => tiled_quantized::launch(device.driver(), kernel, grouping, grid, args),
    }
}
