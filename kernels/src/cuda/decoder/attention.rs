//! Attention, and what comes before it.

use crate::{
    KernelError,
    cuda::{
        CudaAttention, CudaBatch, CudaKvCache, CudaOps,
        driver::Result,
        memory::DeviceBuffer,
        ops::{Attention, HeadNorm, KvLayer, RopeKvWrite, Rotary, attention, rope_kv_write as queue_rope},
        steps::Steps,
        words::DeviceWords,
    },
    ops::{HeadShape, QkTransform, Scoring},
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
    let planned = CudaAttention::Heads { heads, causal: scoring.causal };
    if planned != ops.config.attention {
        let detail = format!("{planned:?} on a device that was opened for {:?}", ops.config.attention);
        return Err(KernelError::Unsupported { op: "paged_attention", detail });
    }
    let mut steps = ops.steps.lock();
    let Steps { arena, workspace, .. } = &mut *steps;
    let plan = DeviceWords::new(arena).part(batch.layout.plan, batch.plan_words)?;
    let (kernels, tokens) = (batch.kernels, batch.extent.tokens);
    attention(&ops.device, Attention { out, qkv, kv, heads, plan, kernels, workspace, scoring, tokens })
}
