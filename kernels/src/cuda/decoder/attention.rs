//! Attention, and what comes before it.

use crate::{
    KernelError,
    cuda::{
        CudaAttention, CudaBatch, CudaKvCache, CudaOps,
        decoder::rows,
        driver::Result,
        memory::DeviceBuffer,
        ops::{
            Attention, HeadNorm, KvLayer, LatentAttention, LatentKvWrite, RopeKvWrite, Rotary,
            attend_latents, attention, rope_kv_write as queue_rope, write_latents,
        },
        steps::Steps,
        words::DeviceWords,
    },
    ops::{HeadShape, LatentShape, Norm, QkTransform, Rotary as RotaryForm, Scoring, Slices},
};

impl CudaKvCache {
    /// One layer of it.
    pub(in crate::cuda) fn layer(&self, layer: usize) -> KvLayer<'_> {
        KvLayer { cache: &self.cache, shape: self.shape, layer }
    }
}

pub(in crate::cuda) fn rope_kv_write(
    ops: &CudaOps,
    qkv: &mut DeviceBuffer,
    kv: KvLayer<'_>,
    transform: QkTransform<'_, DeviceBuffer>,
    (batch, heads): (&CudaBatch, HeadShape),
) -> Result<()> {
    let QkTransform { norm, rotary } = transform;
    let norm = norm.map(|norm| HeadNorm { q_weight: norm.q_weight, k_weight: norm.k_weight, eps: norm.eps });
    let rotary = rotary.map(|r| Rotary { table: r.table, rotary_dim: r.dim, interleaved: r.interleaved });
    let steps = ops.steps.lock();
    let tokens = batch.extent.tokens;
    let positions = steps.words(batch.layout.positions, tokens)?;
    let slot_mapping = steps.words(batch.layout.slot_mapping, tokens)?;
    queue_rope(&ops.device, RopeKvWrite { qkv, kv, heads, positions, slot_mapping, norm, rotary, tokens })
}

pub(in crate::cuda) fn paged_attention(
    ops: &CudaOps,
    out: &mut DeviceBuffer,
    qkv: &DeviceBuffer,
    kv: KvLayer<'_>,
    (batch, heads, scoring): (&CudaBatch, HeadShape, Scoring<'_, DeviceBuffer>),
) -> Result<()> {
    require(ops, "paged_attention", CudaAttention::Heads { heads, causal: scoring.causal })?;
    let mut steps = ops.steps.lock();
    let Steps { arena, workspace, .. } = &mut *steps;
    let plan = DeviceWords::new(arena).part(batch.layout.plan, batch.plan_words)?;
    let (kernels, tokens) = (batch.kernels, batch.extent.tokens);
    attention(&ops.device, Attention { out, qkv, kv, heads, plan, kernels, workspace, scoring, tokens })
}

pub(in crate::cuda) fn latent_kv_write(
    ops: &CudaOps,
    (q_rope, latent): (&mut DeviceBuffer, &mut DeviceBuffer),
    kv: KvLayer<'_>,
    (norm, rotary): (Norm<'_, DeviceBuffer>, RotaryForm<'_, DeviceBuffer>),
    (batch, shape): (&CudaBatch, LatentShape),
) -> Result<()> {
    let tokens = batch.extent.tokens;
    let (width, stride) = (shape.latent_dim, shape.latent_dim + shape.rope_dim);
    rows::norm_slices(ops, latent, norm, Slices { rows: tokens, stride, offset: 0, groups: 1, width })?;
    let steps = ops.steps.lock();
    let positions = steps.words(batch.layout.positions, tokens)?;
    let slot_mapping = steps.words(batch.layout.slot_mapping, tokens)?;
    let call = LatentKvWrite { q_rope, latent, kv, shape, rotary, positions, slot_mapping, tokens };
    write_latents(&ops.device, call)
}

pub(in crate::cuda) fn latent_attention(
    ops: &CudaOps,
    out: &mut DeviceBuffer,
    (q_latent, q_rope): (&DeviceBuffer, &DeviceBuffer),
    kv: KvLayer<'_>,
    (batch, shape, scale): (&CudaBatch, LatentShape, f32),
) -> Result<()> {
    require(ops, "latent_attention", CudaAttention::Latent(shape))?;
    let mut steps = ops.steps.lock();
    let Steps { arena, workspace, .. } = &mut *steps;
    let plan = DeviceWords::new(arena).part(batch.layout.plan, batch.plan_words)?;
    let (kernels, tokens) = (batch.kernels, batch.extent.tokens);
    attend_latents(
        &ops.device,
        LatentAttention { out, q_latent, q_rope, kv, shape, scale, plan, kernels, workspace, tokens },
    )
}

/// Steps carry plans for the attention that the device was opened for.
fn require(ops: &CudaOps, op: &'static str, asked: CudaAttention) -> Result<()> {
    if asked == ops.config.attention {
        return Ok(());
    }
    let detail = format!("{asked:?} on a device that was opened for {:?}", ops.config.attention);
    Err(KernelError::Unsupported { op, detail })
}
