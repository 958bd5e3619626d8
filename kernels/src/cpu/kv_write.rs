//! What happens to queries and keys before attention, and the write of keys and values into the cache.

use super::{
    CpuBuffer, CpuKvCache,
    isa::Host,
    norm::{Fate, Form},
    pool::{Pool, Shared},
    rope::Rotation,
};
use crate::{
    ops::{BatchMeta, HeadShape, LatentShape, Norm, QkTransform, Rotary},
    tensor::{DType, f32_to_f8},
};

/// The arguments of one call.
pub(super) struct Call<'a> {
    pub(super) qkv: &'a mut CpuBuffer,
    pub(super) kv: &'a mut CpuKvCache,
    pub(super) transform: QkTransform<'a, Vec<f32>>,
    pub(super) meta: &'a BatchMeta,
    pub(super) heads: HeadShape,
    pub(super) layer: usize,
}

/// `Ops::rope_kv_write`.
///
/// A task is a key/value head with its group of query heads: whatever the slots are, no two tasks write to the same place.
pub(super) fn run(host: Host, pool: &Pool, call: Call) {
    let Call { qkv, kv, transform, meta, heads, layer } = call;
    let shape = kv.shape;
    assert_eq!(
        (shape.num_kv_heads, shape.head_dim, shape.value_dim),
        (heads.num_kv_heads, heads.head_dim, heads.head_dim),
        "cache of another model"
    );
    let (tokens, width, d) = (meta.num_tokens(), heads.qkv_width(), heads.head_dim);
    let group = heads.num_heads / heads.num_kv_heads;
    let rotation = transform.rotary.as_ref().map(|rotary| Rotation::new(rotary, d));
    let [q_norm, k_norm] = match &transform.norm {
        Some(norm) => [norm.q_weight, norm.k_weight].map(|weight| Some(Form::rms(weight, norm.eps))),
        None => [None; 2],
    };
    assert!([q_norm, k_norm].iter().flatten().all(|norm| norm.width() == d), "a norm over other heads");
    let qkv = Shared::new(&mut qkv.as_mut_slice()[..tokens * width]);
    let [keys, values] = kv.layer_mut(layer);
    let block_bytes = shape.block_size * d * shape.dtype.size();
    let (keys, values) = (Shared::new(keys), Shared::new(values));

    pool.for_each(heads.num_kv_heads, tokens * width / 4, |h| {
        for t in 0..tokens {
            let (block, offset) = place(meta.slot_mapping[t], shape.block_size, shape.num_blocks);
            let at = (block * heads.num_kv_heads + h) * block_bytes;
            // SAFETY: block `block` exists, and head `h` of it is this task's own.
            let (keys, values) = unsafe { (keys.slice(at, block_bytes), values.slice(at, block_bytes)) };
            // SAFETY: query heads `h * group..(h + 1) * group` of token `t`, its key head and its value head are this task's own.
            let head = |i: usize| unsafe { qkv.slice(t * width + i * d, d) };
            let turn = |x: &mut [f32], norm: Option<Form>| {
                if let Some(norm) = norm {
                    // SAFETY: the norm is as wide as the head.
                    unsafe { norm.row(host, x.as_mut_ptr(), x.as_ptr(), Fate::Store) };
                }
                if let Some(rotation) = rotation {
                    rotation.turn(host, x, meta.positions[t]);
                }
            };
            for q in 0..group {
                turn(head(h * group + q), q_norm);
            }
            let key = head(heads.num_heads + h);
            turn(key, k_norm);
            write(keys, key, shape.dtype, offset, shape.block_size);
            write(values, head(heads.num_heads + heads.num_kv_heads + h), shape.dtype, offset * d, 1);
        }
    });
}

/// The arguments of one latent call.
pub(super) struct Latent<'a> {
    pub(super) q_rope: &'a mut CpuBuffer,
    pub(super) latent: &'a mut CpuBuffer,
    pub(super) kv: &'a mut CpuKvCache,
    pub(super) norm: Norm<'a, Vec<f32>>,
    pub(super) rotary: Rotary<'a, Vec<f32>>,
    pub(super) meta: &'a BatchMeta,
    pub(super) shape: LatentShape,
    pub(super) layer: usize,
}

/// Elements of a key that a task writes.
const KEY_CHUNK: usize = 64;

/// `Ops::latent_kv_write`.
pub(super) fn latent(host: Host, pool: &Pool, call: Latent) {
    let Latent { q_rope, latent, kv, norm, rotary, meta, shape, layer } = call;
    let LatentShape { num_heads, latent_dim, rope_dim } = shape;
    let (tokens, d, cache) = (meta.num_tokens(), latent_dim + rope_dim, kv.shape);
    assert_eq!((cache.num_kv_heads, cache.head_dim, cache.value_dim), (1, d, 0), "cache of another model");
    let (norm, rotation) = (Form::new(norm), Rotation::new(&rotary, rope_dim));
    assert!(norm.width() == latent_dim && rotary.dim == rope_dim, "a norm and a rotation of other extents");
    let q_width = num_heads * rope_dim;
    let queries = Shared::new(&mut q_rope.as_mut_slice()[..tokens * q_width]);
    let keys = Shared::new(&mut latent.as_mut_slice()[..tokens * d]);
    pool.for_each(tokens, tokens * (d + q_width), |t| {
        // SAFETY: the queries and the key of token `t` are this task's own.
        let (queries, key) = unsafe { (queries.slice(t * q_width, q_width), keys.slice(t * d, d)) };
        for head in queries.chunks_exact_mut(rope_dim) {
            rotation.turn(host, head, meta.positions[t]);
        }
        let (value, rope) = key.split_at_mut(latent_dim);
        // SAFETY: the norm is as wide as the value.
        unsafe { norm.row(host, value.as_mut_ptr(), value.as_ptr(), Fate::Store) };
        rotation.turn(host, rope, meta.positions[t]);
    });

    // A task is a range of elements of all tokens: whatever the slots are, no two write to the same place.
    let latent = &latent.as_slice()[..tokens * d];
    let [keys, _] = kv.layer_mut(layer);
    let keys = Shared::new(keys);
    let element_bytes = cache.block_size * cache.dtype.size();
    pool.for_each(d.div_ceil(KEY_CHUNK), tokens * d, |task| {
        let first = task * KEY_CHUNK;
        let count = KEY_CHUNK.min(d - first);
        for (t, &slot) in meta.slot_mapping.iter().enumerate().take(tokens) {
            let (block, offset) = place(slot, cache.block_size, cache.num_blocks);
            // SAFETY: block `block` exists, and these elements of it are this task's own.
            let keys = unsafe { keys.slice((block * d + first) * element_bytes, count * element_bytes) };
            write(keys, &latent[t * d + first..][..count], cache.dtype, offset, cache.block_size);
        }
    });
}

/// Block of a slot, and place in the block.
fn place(slot: u32, block_size: usize, num_blocks: usize) -> (usize, usize) {
    let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
    assert!(block < num_blocks, "slot {slot} of {}", num_blocks * block_size);
    (block, offset)
}

/// Stores `x[i]` at element `first + i * stride`.
fn write(out: &mut [u8], x: &[f32], dtype: DType, first: usize, stride: usize) {
    let size = dtype.size();
    let places = out[first * size..].chunks_mut(stride * size);
    match dtype {
        DType::F32 => {
            for (place, v) in places.zip(x) {
                place[..4].copy_from_slice(&v.to_ne_bytes());
            }
        }
        DType::F8E4M3 => {
            for (place, v) in places.zip(x) {
                place[0] = f32_to_f8(*v);
            }
        }
        _ => {
            for (place, v) in places.zip(x) {
                place[..2].copy_from_slice(&half::bf16::from_f32(*v).to_ne_bytes());
            }
        }
    }
}
