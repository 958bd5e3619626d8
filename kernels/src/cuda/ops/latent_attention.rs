//! `latent_attention.cu`.

use super::{
    attention::{AttentionArgs, AttentionKernels, AttentionWorkspace, checked_plan},
    paged_kv::KvLayer,
};
use crate::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::DeviceBuffer,
        table::kernels,
        words::DeviceWords,
    },
    ops::LatentShape,
};

kernels! {
    file "latent_attention";
    /// A block per item: 16 query rows.
    fn latent_attention(args: Args);
    /// A warp per query row of a split item.
    fn latent_combine(args: Args);
}

const OP: &str = "latent_attention";
const THREADS: u32 = 128;

/// `LatentArgs` of the kernels' file.
#[derive(Clone, Copy)]
#[repr(C)]
struct Args {
    attention: AttentionArgs,
    q_rope: DevPtr,
    latent_dim: i32,
    rope_dim: i32,
}

/// Arguments of [`attend_latents`]. Letters as in [`crate::ops`].
pub struct LatentAttention<'a> {
    /// `[T, Q * L]` bf16, written but for the tokens of padding rows.
    pub out: &'a mut DeviceBuffer,
    /// `[T, Q * L]` bf16.
    pub q_latent: &'a DeviceBuffer,
    /// `[T, Q * R]` bf16.
    pub q_rope: &'a DeviceBuffer,
    /// Holds the step's own keys already.
    pub kv: KvLayer<'a>,
    /// Q, L and R.
    pub shape: LatentShape,
    /// What scores are multiplied with.
    pub scale: f32,
    /// Made by [`super::attention_plan`] as [`super::PlanKind::Latent`] for these heads, blocks and this workspace; 16-byte aligned.
    pub plan: DeviceWords<'a>,
    /// The kernels that the plan needs, or more.
    pub kernels: AttentionKernels,
    /// For split rows, of L elements.
    pub workspace: &'a mut AttentionWorkspace,
    /// T, as the buffers must hold it; 0 does nothing.
    pub tokens: usize,
}

/// Queues the attention of a step's tokens; see [`crate::Ops::latent_attention`]. Bits do not depend on the plan.
///
/// # Errors
/// Extents that the kernels cannot take; a buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn attend_latents(device: &Device, call: LatentAttention<'_>) -> Result<()> {
    let args = checked(&call)?;
    if call.tokens == 0 {
        return Ok(());
    }
    let (driver, sms) = (device.driver(), device.driver().info().num_sms as usize);
    let mut config = LaunchConfig::linear(2 * sms, THREADS);
    if call.kernels.split {
        config.shared_bytes = shared_bytes(call.shape);
        // SAFETY: (1) `checked` compared all extents with the buffers; (2) the plan was made for them, as the caller promises;
        // (3) the shared memory is what the kernel's header asks for.
        unsafe { latent_attention(driver, config, args) }?;
    }
    if call.kernels.combine {
        // SAFETY: as above; the partial results were queued before.
        unsafe { latent_combine(driver, LaunchConfig::linear(4 * sms, THREADS), args) }?;
    }
    Ok(())
}

/// 16 queries and two stages of 32 keys, in rows of whole pairs of mma steps and 16 bytes more; then scores.
fn shared_bytes(shape: LatentShape) -> u32 {
    let row_bytes = 2 * ((shape.latent_dim + shape.rope_dim).next_multiple_of(32) + 8);
    ((16 + 2 * 32) * row_bytes + 16 * 40 * 4) as u32
}

/// Refuses extents that the kernels cannot take, before anything is loaded for them.
///
/// # Errors
/// [`KernelError::Unsupported`].
pub fn check_latent(shape: LatentShape) -> Result<()> {
    let LatentShape { num_heads, latent_dim, rope_dim } = shape;
    let fits =
        |extent: usize, of: usize, most: usize| (of..=most).contains(&extent) && extent.is_multiple_of(of);
    if (1..=usize::from(u16::MAX)).contains(&num_heads) && fits(latent_dim, 16, 512) && fits(rope_dim, 8, 64)
    {
        return Ok(());
    }
    let detail = format!(
        "{num_heads} heads over latents of {latent_dim} and {rope_dim} elements; the CUDA kernels take multiples of 16 up to 512 and of 8 \
         up to 64 (use --device cpu)"
    );
    Err(KernelError::Unsupported { op: OP, detail })
}

fn checked(call: &LatentAttention<'_>) -> Result<Args> {
    let LatentAttention { shape, tokens, scale, .. } = *call;
    let LatentShape { num_heads, latent_dim, rope_dim } = shape;
    check_latent(shape)?;
    if !(scale.is_finite() && scale > 0.0) {
        return Err(KernelError::Unsupported { op: OP, detail: format!("scale {scale} must be positive") });
    }
    let [partial_o, partial_ml] = call.workspace.checked(OP, latent_dim)?;
    let latents = tokens * num_heads * latent_dim;
    let attention = AttentionArgs {
        out: call.out.at_least(OP, "out", DType::Bf16, latents)?,
        qkv: call.q_latent.at_least(OP, "q_latent", DType::Bf16, latents)?,
        kv: call.kv.checked_latent(OP, latent_dim + rope_dim)?,
        plan: checked_plan(OP, call.plan)?,
        slopes: DevPtr::NULL,
        sinks: DevPtr::NULL,
        partial_o,
        partial_ml,
        num_heads: num_heads as i32,
        num_kv_heads: 1,
        block_shift: call.kv.block_shift(),
        window: 0,
        scale,
        soft_cap: 0.0,
        both_ways: 0,
    };
    let q_rope = call.q_rope.at_least(OP, "q_rope", DType::Bf16, tokens * num_heads * rope_dim)?;
    Ok(Args { attention, q_rope, latent_dim: latent_dim as i32, rope_dim: rope_dim as i32 })
}
