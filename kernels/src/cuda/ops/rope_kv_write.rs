//! `rope_kv_write.cu`.

use super::paged_kv::{KvLayer, check_heads};
use crate::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::{DeviceBuffer, require_multiple},
        table::kernels,
        words::DeviceWords,
    },
    ops::HeadShape,
};

kernels! {
    file "rope_kv_write";
    /// Heads of up to 64 elements.
    fn rope_kv_write_8(args: Args);
    /// Heads of up to 128 elements.
    fn rope_kv_write_16(args: Args);
    /// Heads of up to 256 elements.
    fn rope_kv_write_32(args: Args);
}

const OP: &str = "rope_kv_write";
const THREADS: usize = 128;

/// `RopeKvWriteArgs` of the kernel's file.
#[repr(C)]
struct Args {
    qkv: DevPtr,
    kv: DevPtr,
    q_weight: DevPtr,
    k_weight: DevPtr,
    table: DevPtr,
    positions: DevPtr,
    slot_mapping: DevPtr,
    num_heads: i32,
    num_kv_heads: i32,
    head_dim: i32,
    rotary_dim: i32,
    block_shift: i32,
    interleaved: i32,
    eps: f32,
    kv_f8: i32,
}

/// Slot of a padding token: it is left as it is, and nothing is written to the cache for it.
pub const PADDING_SLOT: u32 = u32::MAX;

/// RMS norm of each query and key head before the rotation (Qwen3).
pub struct HeadNorm<'a> {
    /// `[D]` f32, for all query heads.
    pub q_weight: &'a DeviceBuffer,
    /// `[D]` f32, for all key heads.
    pub k_weight: &'a DeviceBuffer,
    /// Added to the mean square.
    pub eps: f32,
}

/// Rotary position embedding.
pub struct Rotary<'a> {
    /// `[max_positions, R]` f32: for each position R/2 cosines, then R/2 sines.
    pub table: &'a DeviceBuffer,
    /// R, even, at most D: how many elements of a head are rotated.
    pub rotary_dim: usize,
    /// Pairs are `(2i, 2i + 1)` instead of `(i, i + R/2)`.
    pub interleaved: bool,
}

/// Arguments of [`rope_kv_write`]. Letters as in [`crate::ops`].
pub struct RopeKvWrite<'a> {
    /// `[T, (Q + 2 K) * D]` bf16; queries and keys are changed in place.
    pub qkv: &'a mut DeviceBuffer,
    /// Written at the tokens' slots.
    pub kv: KvLayer<'a>,
    /// Q, K and D; D a multiple of 8, at most 256.
    pub heads: HeadShape,
    /// `[T]`, each within the table.
    pub positions: DeviceWords<'a>,
    /// `[T]`, each within the cache, or [`PADDING_SLOT`]; no slot twice.
    pub slot_mapping: DeviceWords<'a>,
    /// Absent for models that do not normalise heads.
    pub norm: Option<HeadNorm<'a>>,
    /// Absent for models with another kind of positions (ALiBi).
    pub rotary: Option<Rotary<'a>>,
    /// T; 0 does nothing.
    pub tokens: usize,
}

/// Queues norm, rotation and cache write of a step's tokens in one launch; see [`crate::Ops::rope_kv_write`].
///
/// # Errors
/// A head size or rotation that the kernel cannot take; a buffer that is smaller or of another type than the contract says; what the
/// driver reports.
pub fn rope_kv_write(device: &Device, call: RopeKvWrite<'_>) -> Result<()> {
    let RopeKvWrite { qkv, kv, heads, positions, slot_mapping, norm, rotary, tokens } = call;
    let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
    check_heads(OP, heads)?;
    require_multiple(OP, "D", head_dim, 8)?;
    if head_dim > 256 {
        let detail = format!("D is {head_dim}; the CUDA kernel takes heads of up to 256 elements");
        return Err(KernelError::Unsupported { op: OP, detail });
    }
    let (q_weight, k_weight, eps) = match norm {
        Some(HeadNorm { q_weight, k_weight, eps }) => (
            q_weight.at_least(OP, "q_weight", DType::F32, head_dim)?,
            k_weight.at_least(OP, "k_weight", DType::F32, head_dim)?,
            eps,
        ),
        None => (DevPtr::NULL, DevPtr::NULL, 0.0),
    };
    let (table, rotary_dim, interleaved) = match rotary {
        Some(rotary) => checked_rotary(&rotary, head_dim)?,
        None => (DevPtr::NULL, 0, false),
    };
    let cache = kv.checked(OP, heads)?;
    if tokens == 0 {
        return Ok(());
    }
    let args = Args {
        qkv: qkv.at_least(OP, "qkv", DType::Bf16, tokens * heads.qkv_width())?,
        kv: cache,
        q_weight,
        k_weight,
        table,
        positions: positions.at_least(OP, "positions", tokens)?,
        slot_mapping: slot_mapping.at_least(OP, "slot_mapping", tokens)?,
        num_heads: num_heads as i32,
        num_kv_heads: num_kv_heads as i32,
        head_dim: head_dim as i32,
        rotary_dim: rotary_dim as i32,
        block_shift: kv.block_shift(),
        interleaved: i32::from(interleaved),
        eps,
        kv_f8: i32::from(kv.is_f8()),
    };
    let lanes = (head_dim / 8).next_power_of_two().max(8);
    let teams = (num_heads + 2 * num_kv_heads).div_ceil(THREADS / lanes);
    let config = LaunchConfig {
        grid: [tokens as u32, teams as u32, 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: 0,
    };
    let launch = match lanes {
        8 => rope_kv_write_8,
        16 => rope_kv_write_16,
        _ => rope_kv_write_32,
    };
    // SAFETY: (1) the extents of all buffers were checked above; (2) the kernel has as many lanes to a head as D needs; (3) positions and
    // slots lie within table and cache, as the scheduler that made them promises.
    unsafe { launch(device.driver(), config, args) }
}

fn checked_rotary(rotary: &Rotary<'_>, head_dim: usize) -> Result<(DevPtr, usize, bool)> {
    let Rotary { table, rotary_dim, interleaved } = *rotary;
    require_multiple(OP, "the rotary size", rotary_dim, 2)?;
    if rotary_dim > head_dim || !table.elems().is_multiple_of(rotary_dim) {
        let detail = format!(
            "a rotary size of {rotary_dim} does not go with heads of {head_dim} and a table of {} elements",
            table.elems()
        );
        return Err(KernelError::Unsupported { op: OP, detail });
    }
    Ok((table.at_least(OP, "rope table", DType::F32, rotary_dim)?, rotary_dim, interleaved))
}
