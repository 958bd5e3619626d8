//! Matrix products over rows in the order of their experts: the grouped kernels of `linear_skinny.cu` and `linear_tiled.cu`.

use super::permute::{MoeOrder, OrderPtrs};
use crate::cuda::{
    Device,
    driver::Result,
    matrix::ProductWeight,
    memory::DeviceBuffer,
    ops::linear::{self, Grouping, LinearArgs, LinearEpilogue, Operands},
};

const OP: &str = "moe_linear";

/// What a product has in its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoeRows {
    /// The first product: `x` is `[T, K]`, and each token is read once per expert.
    Tokens,
    /// The last product: `x` is `[T * k, K]`, what the first has written.
    Pairs,
}

/// Arguments of [`moe_linear`].
pub struct MoeLinear<'a> {
    /// What [`super::moe_permute`] made of this step.
    pub order: MoeOrder<'a>,
    /// What `x` has.
    pub rows: MoeRows,
    /// `[T * k, N]` bf16 or f32, written: a row per pair.
    pub out: &'a mut DeviceBuffer,
    /// `[T, K]` or `[T * k, K]` bf16.
    pub x: &'a DeviceBuffer,
    /// `[E, N, K]`; `[E, 2 N, K]`, gate rows first, when the epilogue is gated.
    pub weight: &'a dyn ProductWeight,
    /// `[E, N]` or `[E, 2 N]`, f32 or bf16.
    pub bias: Option<&'a DeviceBuffer>,
    /// N.
    pub n: usize,
    /// K, a multiple of 8; of 32 for a quantised weight.
    pub k: usize,
    /// What happens to the product.
    pub epilogue: LinearEpilogue,
}

/// Queues one product per expert, each over its own rows: [`super::super::linear()`] with the expert's weight, to the bit.
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; extents beyond the kernels' index range; what the driver
/// reports.
pub fn moe_linear(device: &Device, call: MoeLinear<'_>) -> Result<()> {
    let MoeLinear { order, rows, out, x, weight, bias, n, k, epilogue } = call;
    let OrderPtrs { sorted_pairs, offsets, tiles } = order.check(OP)?;
    let (x_rows, divisor) = match rows {
        MoeRows::Tokens => (order.tokens, order.shape.top_k),
        MoeRows::Pairs => (order.pairs(), 1),
    };
    let experts = order.shape.experts;
    let operands =
        Operands { op: OP, out, out_rows: order.pairs(), x, x_rows, weight, bias, experts, n, k, epilogue };
    let divisor = divisor as u32;
    let args = LinearArgs { tiles, offsets, pairs: sorted_pairs, divisor, ..operands.check()? };
    if order.tokens == 0 {
        return Ok(());
    }
    linear::launch(device, order.kernel, Grouping::Experts, order.max_tiles(), args)
}
