//! `gather_rows.cu`.

use crate::{
    DType,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::{DeviceBuffer, require_multiple},
        table::kernels,
        words::DeviceWords,
    },
};

kernels! {
    file "gather_rows";
    /// One block per row.
    fn gather_rows_bf16(out: DevPtr, x: DevPtr, logits_indices: DevPtr, width: i32);
}

const OP: &str = "gather_rows";
const THREADS: u32 = 256;

/// The index of a row that only fills up a captured graph: it receives zeros.
pub const PADDING_INDEX: u32 = u32::MAX;

/// Arguments of [`gather_rows`]. Letters as in [`crate::ops`].
pub struct GatherRows<'a> {
    /// `[R, H]` bf16, written.
    pub out: &'a mut DeviceBuffer,
    /// `[T, H]` bf16.
    pub x: &'a DeviceBuffer,
    /// `[R]` rows of `x`, or [`PADDING_INDEX`].
    pub logits_indices: DeviceWords<'a>,
    /// H, a multiple of 8.
    pub width: usize,
    /// R; 0 does nothing.
    pub rows: usize,
}

/// Queues the gathering; see [`crate::Ops::gather_rows`].
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn gather_rows(device: &Device, call: GatherRows<'_>) -> Result<()> {
    let GatherRows { out, x, logits_indices, width, rows } = call;
    require_multiple(OP, "H", width, 8)?;
    if rows == 0 {
        return Ok(());
    }
    let out = out.at_least(OP, "out", DType::Bf16, rows * width)?;
    let x = x.at_least(OP, "x", DType::Bf16, width)?;
    let logits_indices = logits_indices.at_least(OP, "logits_indices", rows)?;
    let config = LaunchConfig::linear(rows, THREADS);
    // SAFETY: out and the indices were checked above; the step's plan gives indices below its own T rows of x.
    unsafe { gather_rows_bf16(device.driver(), config, out, x, logits_indices, width as i32) }
}
