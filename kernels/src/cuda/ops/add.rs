//! `add.cu`.

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
    file "add";
    /// Eight elements to a thread.
    fn add_bf16(out: DevPtr, x: DevPtr, elems: u64);
    /// A row has one gate.
    fn add_gated_bf16(out: DevPtr, x: DevPtr, gate: DevPtr, width: i32);
}

const THREADS: u32 = 256;
/// Elements that one block computes.
const BLOCK_ELEMS: usize = 2048;

/// Queues `out[i] += x[i]` for the first `elems` elements, a multiple of 8, of bf16; see [`crate::Ops::add`].
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn add(device: &Device, out: &mut DeviceBuffer, x: &DeviceBuffer, elems: usize) -> Result<()> {
    const OP: &str = "add";
    if elems == 0 {
        return Ok(());
    }
    require_multiple(OP, "the number of elements", elems, 8)?;
    let out = out.at_least(OP, "out", DType::Bf16, elems)?;
    let x = x.at_least(OP, "x", DType::Bf16, elems)?;
    let config = LaunchConfig::linear(elems.div_ceil(BLOCK_ELEMS), THREADS);
    // SAFETY: the extents of both buffers were checked above.
    unsafe { add_bf16(device.driver(), config, out, x, elems as u64) }
}

/// Arguments of [`add_gated`].
pub struct AddGated<'a> {
    /// `[rows, width]` bf16, added to.
    pub out: &'a mut DeviceBuffer,
    /// `[rows, width]` bf16.
    pub x: &'a DeviceBuffer,
    /// `[rows]` f32.
    pub gate: &'a DeviceBuffer,
    /// Rows; 0 does nothing.
    pub rows: usize,
    /// Elements of a row, a multiple of 8.
    pub width: usize,
}

/// Queues `out[r, :] += x[r, :] / (1 + e^-gate[r])`; see [`crate::Ops::add_gated`].
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn add_gated(device: &Device, call: AddGated<'_>) -> Result<()> {
    const OP: &str = "add_gated";
    let AddGated { out, x, gate, rows, width } = call;
    require_multiple(OP, "the width", width, 8)?;
    if rows == 0 {
        return Ok(());
    }
    let out = out.at_least(OP, "out", DType::Bf16, rows * width)?;
    let x = x.at_least(OP, "x", DType::Bf16, rows * width)?;
    let gate = gate.at_least(OP, "gate", DType::F32, rows)?;
    let mut config = LaunchConfig::linear(rows, THREADS);
    config.grid[1] = width.div_ceil(BLOCK_ELEMS) as u32;
    // SAFETY: the extents of all buffers were checked above.
    unsafe { add_gated_bf16(device.driver(), config, out, x, gate, width as i32) }
}
