//! Latent attention in its absorbed form: one key for all heads, whose first elements are the value.

use super::{Mode, Queries, View};
use crate::{
    cpu::{
        CpuBuffer, CpuKvCache,
        isa::Host,
        pool::{Pool, Shared},
    },
    ops::{BatchMeta, LatentShape, Scoring},
};

/// The arguments of one call.
pub(in crate::cpu) struct Latent<'a> {
    pub(in crate::cpu) out: &'a mut CpuBuffer,
    pub(in crate::cpu) q_latent: &'a CpuBuffer,
    pub(in crate::cpu) q_rope: &'a CpuBuffer,
    pub(in crate::cpu) kv: &'a CpuKvCache,
    pub(in crate::cpu) meta: &'a BatchMeta,
    pub(in crate::cpu) shape: LatentShape,
    pub(in crate::cpu) scale: f32,
    pub(in crate::cpu) layer: usize,
}

/// `Ops::latent_attention`.
pub(in crate::cpu) fn run(host: Host, pool: &Pool, call: Latent) {
    let Latent { out, q_latent, q_rope, kv, meta, shape, scale, layer } = call;
    let LatentShape { num_heads, latent_dim, rope_dim } = shape;
    assert_eq!(
        (kv.shape.num_kv_heads, kv.shape.head_dim, kv.shape.value_dim),
        (1, latent_dim + rope_dim, 0),
        "cache of another model"
    );
    let (tokens, width) = (meta.num_tokens(), num_heads * latent_dim);
    let [keys, values] = kv.layer(layer);
    let view = View {
        keys,
        values,
        meta,
        queries: Queries {
            heads: &q_latent.as_slice()[..tokens * width],
            stride: width,
            dim: latent_dim,
            tails: &q_rope.as_slice()[..tokens * num_heads * rope_dim],
        },
        out: Shared::new(&mut out.as_mut_slice()[..tokens * width]),
        num_heads,
        num_kv_heads: 1,
        key_dim: latent_dim + rope_dim,
        value_dim: latent_dim,
        scoring: Scoring { scale, window: None, soft_cap: None, slopes: None, sinks: None, causal: true },
        block_size: kv.shape.block_size,
        blocks: kv.shape.num_blocks,
        dtype: kv.shape.dtype,
    };
    view.attend(host, pool, Mode::OfKeys);
}
