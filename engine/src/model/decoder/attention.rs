//! A layer's attention, up to its output projection.

use tidemill_kernels::{
    KernelError, Ops,
    ops::{Epilogue, HeadNorm, HeadShape, Norm, QkTransform, Rotary, Scoring, Slices},
};

use super::{
    OnDevice,
    layer::{Input, Step},
    scratch::Scratch,
};
use crate::model::{
    lora::Site,
    parts::{Attention, GroupedAttention, Latent, Layer},
    spec::{AttentionSpec, Heads, LatentHeads, NormKind, QkNorm},
};

const LATENT: &str = "scratch is made of the same specification as the layers";

impl<O: Ops> Step<'_, O> {
    /// Fills `attention`.
    pub(super) fn attention(
        &self,
        s: &mut Scratch<O>,
        kv: &mut O::KvCache,
        layer: &Layer<OnDevice<O>>,
        (index, input): (usize, Input),
    ) -> Result<(), KernelError> {
        match (&layer.attention, self.spec.heads) {
            (Attention::Grouped(weights), _) => self.grouped(s, kv, weights, (index, input)),
            (Attention::Latent(weights), Heads::Latent(heads)) => {
                self.latent(s, kv, weights, (heads, index, input))
            }
            (Attention::Latent(_), Heads::Grouped(_)) => unreachable!("{LATENT}"),
        }
    }

    fn grouped(
        &self,
        s: &mut Scratch<O>,
        kv: &mut O::KvCache,
        weights: &GroupedAttention<OnDevice<O>>,
        (index, input): (usize, Input),
    ) -> Result<(), KernelError> {
        let Self { ops, batch, tokens, .. } = *self;
        let (spec, heads) = (&self.spec.layers[index].attention, self.spec.head_shape());
        let x = input.pick(&s.hidden, &s.normed, &s.second_normed);
        ops.linear(&mut s.qkv, x, &weights.qkv_proj, tokens, Epilogue::Store)?;
        self.adapt(&mut s.qkv, x, (index, Site::Qkv))?;
        let mut norm = None;
        if let (Some(kind), Some([q, k])) = (spec.qk_norm, &weights.qk_norm) {
            match kind {
                QkNorm::Head => {
                    norm = Some(HeadNorm { q_weight: q, k_weight: k, eps: self.spec.norm.eps as f32 });
                }
                QkNorm::OwnHead | QkNorm::Projection => self.qk_norm(&mut s.qkv, kind, [q, k], heads)?,
            }
        }
        let transform = QkTransform { norm, rotary: self.rotary(spec) };
        ops.rope_kv_write(&mut s.qkv, kv, transform, batch, heads, index)?;
        let scoring = Scoring {
            scale: spec.scale,
            window: spec.window,
            soft_cap: spec.soft_cap,
            slopes: self.alibi,
            sinks: weights.sinks.as_ref(),
            causal: spec.is_causal,
        };
        ops.paged_attention(&mut s.attention, &s.qkv, kv, batch, heads, scoring, index)
    }

    fn rotary(&self, spec: &AttentionSpec) -> Option<Rotary<'_, O::Vector>> {
        let index = spec.rope?;
        let rope = &self.spec.ropes[index];
        Some(Rotary { table: &self.ropes[index], dim: rope.dim, interleaved: rope.is_interleaved })
    }

    /// Norms of queries and keys whose heads have weights of their own.
    fn qk_norm(
        &self,
        qkv: &mut O::Buffer,
        kind: QkNorm,
        weights: [&O::Vector; 2],
        heads: HeadShape,
    ) -> Result<(), KernelError> {
        let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
        let eps = self.spec.norm.eps as f32;
        let counts = [(0, num_heads), (num_heads * head_dim, num_kv_heads)];
        for (weight, (offset, count)) in weights.into_iter().zip(counts) {
            let norm = match self.spec.norm.kind {
                NormKind::Rms => Norm::Rms { weight, eps },
                NormKind::Layer { .. } => Norm::Layer { weight, bias: None, eps },
            };
            let (groups, width) = match kind {
                QkNorm::Projection => (1, count * head_dim),
                QkNorm::Head | QkNorm::OwnHead => (count, head_dim),
            };
            let slices = Slices { rows: self.tokens, stride: heads.qkv_width(), offset, groups, width };
            self.ops.norm_slices(qkv, norm, slices)?;
        }
        Ok(())
    }

    fn latent(
        &self,
        s: &mut Scratch<O>,
        kv: &mut O::KvCache,
        weights: &Latent<OnDevice<O>>,
        (heads, index, input): (LatentHeads, usize, Input),
    ) -> Result<(), KernelError> {
        let Self { ops, batch, tokens, .. } = *self;
        let (spec, eps) = (&self.spec.layers[index].attention, heads.eps as f32);
        let rotary = self.rotary(spec).expect("families with latent attention rotate in every layer");
        let Scratch { hidden, normed, second_normed, qkv: q_nope, attention, latent, .. } = s;
        let l = latent.as_mut().expect(LATENT);
        let x = input.pick(hidden, normed, second_normed);
        if let (Some((down, weight)), Some(width)) = (&weights.query_down, heads.query_rank) {
            ops.linear(&mut l.query, x, down, tokens, Epilogue::Store)?;
            let slices = Slices { rows: tokens, stride: width, offset: 0, groups: 1, width };
            ops.norm_slices(&mut l.query, Norm::Rms { weight, eps }, slices)?;
        }
        let query = if weights.query_down.is_some() { &l.query } else { x };
        ops.linear(q_nope, query, &weights.q_nope, tokens, Epilogue::Store)?;
        ops.linear(&mut l.q_rope, query, &weights.q_rope, tokens, Epilogue::Store)?;
        ops.linear_heads(&mut l.q_latent, q_nope, &weights.key_heads, tokens)?;
        ops.linear(&mut l.latent, x, &weights.kv_down, tokens, Epilogue::Store)?;
        let (shape, norm) = (heads.shape(), Norm::Rms { weight: &weights.latent_norm, eps });
        ops.latent_kv_write(&mut l.q_rope, &mut l.latent, kv, norm, rotary, batch, shape, index)?;
        ops.latent_attention(&mut l.out, &l.q_latent, &l.q_rope, kv, batch, shape, spec.scale, index)?;
        ops.linear_heads(attention, &l.out, &weights.value_heads, tokens)
    }
}
