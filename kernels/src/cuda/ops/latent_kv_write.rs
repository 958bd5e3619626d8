//! `latent_kv_write.cu`.

use super::{latent_attention::check_latent, paged_kv::KvLayer};
use crate::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::DeviceBuffer,
        table::kernels,
        words::DeviceWords,
    },
    ops::{LatentShape, Rotary},
};

kernels! {
    file "latent_kv_write";
    /// Four pairs of elements to a thread.
    fn latent_kv_write(args: Args);
}

const OP: &str = "latent_kv_write";
const THREADS: u32 = 128;
/// Pairs that one block rotates.
const BLOCK_PAIRS: usize = 512;

/// `LatentKvWriteArgs` of the kernel's file.
#[repr(C)]
struct Args {
    q_rope: DevPtr,
    latent: DevPtr,
    kv: DevPtr,
    table: DevPtr,
    positions: DevPtr,
    slot_mapping: DevPtr,
    num_heads: i32,
    latent_dim: i32,
    rope_dim: i32,
    interleaved: i32,
}

/// Arguments of [`write_latents`]. Letters as in [`crate::ops`].
pub struct LatentKvWrite<'a> {
    /// `[T, Q * R]` bf16, rotated in place.
    pub q_rope: &'a mut DeviceBuffer,
    /// `[T, L + R]` bf16, normalised already; its R are rotated in place.
    pub latent: &'a mut DeviceBuffer,
    /// Written at the tokens' slots.
    pub kv: KvLayer<'a>,
    /// Q, L and R.
    pub shape: LatentShape,
    /// Its `dim` is R.
    pub rotary: Rotary<'a, DeviceBuffer>,
    /// `[T]`, each within the table.
    pub positions: DeviceWords<'a>,
    /// `[T]`, each within the cache, or [`super::PADDING_SLOT`]; no slot twice.
    pub slot_mapping: DeviceWords<'a>,
    /// T; 0 does nothing.
    pub tokens: usize,
}

/// Queues rotation and cache write of a step's tokens; see [`crate::Ops::latent_kv_write`], which normalises first.
///
/// # Errors
/// Extents or a rotation that the kernel cannot take; a buffer that is smaller or of another type than the contract says; what the
/// driver reports.
pub fn write_latents(device: &Device, call: LatentKvWrite<'_>) -> Result<()> {
    let LatentKvWrite { q_rope, latent, kv, shape, rotary, positions, slot_mapping, tokens } = call;
    check_latent(shape)?;
    let LatentShape { num_heads, latent_dim, rope_dim } = shape;
    let (width, table) = (latent_dim + rope_dim, rotary.table);
    if rotary.dim != rope_dim || !table.elems().is_multiple_of(rope_dim) {
        let detail = format!(
            "a rotary size of {} does not go with {rope_dim} elements and a table of {}",
            rotary.dim,
            table.elems()
        );
        return Err(KernelError::Unsupported { op: OP, detail });
    }
    let kv = kv.checked_latent(OP, width)?;
    if tokens == 0 {
        return Ok(());
    }
    let args = Args {
        q_rope: q_rope.at_least(OP, "q_rope", DType::Bf16, tokens * num_heads * rope_dim)?,
        latent: latent.at_least(OP, "latent", DType::Bf16, tokens * width)?,
        kv,
        table: table.at_least(OP, "rope table", DType::F32, rope_dim)?,
        positions: positions.at_least(OP, "positions", tokens)?,
        slot_mapping: slot_mapping.at_least(OP, "slot_mapping", tokens)?,
        num_heads: num_heads as i32,
        latent_dim: latent_dim as i32,
        rope_dim: rope_dim as i32,
        interleaved: i32::from(rotary.interleaved),
    };
    let blocks = ((num_heads + 1) * rope_dim / 2).div_ceil(BLOCK_PAIRS);
    let grid = [tokens as u32, blocks as u32, 1];
    let config = LaunchConfig { grid, block: [THREADS, 1, 1], shared_bytes: 0 };
    // SAFETY: the extents of all buffers were checked above; positions and slots lie within table and cache, as the scheduler that made
    // them promises.
    unsafe { latent_kv_write(device.driver(), config, args) }
}
