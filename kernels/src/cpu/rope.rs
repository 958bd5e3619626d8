//! Rotary position embedding, and the write of keys and values into the cache.

use super::{
    CpuBuffer, CpuKvCache,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::Simd,
};
use crate::{
    ops::{BatchMeta, HeadShape},
    tensor::DType,
};

/// The arguments of one call.
pub(super) struct Call<'a> {
    pub(super) qkv: &'a mut CpuBuffer,
    pub(super) kv: &'a mut CpuKvCache,
    pub(super) rope: &'a [f32],
    pub(super) meta: &'a BatchMeta,
    pub(super) heads: HeadShape,
    pub(super) layer: usize,
}

/// `Ops::rope_kv_write`.
///
/// A task is a key/value head with its group of query heads: whatever the slots are, no two tasks write to the same place.
pub(super) fn run(host: Host, pool: &Pool, call: Call) {
    let Call { qkv, kv, rope, meta, heads, layer } = call;
    let shape = kv.shape;
    assert_eq!(
        (shape.num_kv_heads, shape.head_dim),
        (heads.num_kv_heads, heads.head_dim),
        "cache of another model"
    );
    let (tokens, width, d) = (meta.num_tokens(), heads.qkv_width(), heads.head_dim);
    let group = heads.num_heads / heads.num_kv_heads;
    let qkv = Shared::new(&mut qkv.as_mut_slice()[..tokens * width]);
    let [keys, values] = kv.layer_mut(layer);
    let block_bytes = shape.block_size * d * shape.dtype.size();
    let (keys, values) = (Shared::new(keys), Shared::new(values));

    pool.for_each(heads.num_kv_heads, tokens * width / 4, |h| {
        for t in 0..tokens {
            let slot = meta.slot_mapping[t] as usize;
            let (block, offset) = (slot / shape.block_size, slot % shape.block_size);
            assert!(block < shape.num_blocks, "slot {slot} of {}", shape.num_blocks * shape.block_size);
            let at = (block * heads.num_kv_heads + h) * block_bytes;
            // SAFETY: block `block` exists, and head `h` of it is this task's own.
            let (keys, values) = unsafe { (keys.slice(at, block_bytes), values.slice(at, block_bytes)) };
            let position = meta.positions[t] as usize;
            let (cos, sin) = rope[position * d..(position + 1) * d].split_at(d / 2);
            for q in 0..group {
                // SAFETY: query head `h * group + q` of token `t` is this task's own.
                let x = unsafe { qkv.slice(t * width + (h * group + q) * d, d) };
                host.run(Rotate { x, cos, sin });
            }
            // SAFETY: so are its key head and its value head.
            let [key, value] = [heads.num_heads + h, heads.num_heads + heads.num_kv_heads + h]
                .map(|i| unsafe { qkv.slice(t * width + i * d, d) });
            host.run(Rotate { x: key, cos, sin });

            write(keys, key, shape.dtype, offset, shape.block_size);
            write(values, value, shape.dtype, offset * d, 1);
        }
    });
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
        _ => {
            for (place, v) in places.zip(x) {
                place[..2].copy_from_slice(&half::bf16::from_f32(*v).to_ne_bytes());
            }
        }
    }
}

struct Rotate<'a> {
    x: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Job for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let half = self.cos.len();
        let (lo, hi) = self.x.split_at_mut(half);
        let mut at = 0;
        while at < half {
            let n = (half - at).min(S::LANES);
            // SAFETY: elements `at..at + n` of the four slices of length `half`.
            unsafe {
                let (a, b) = (s.load_first(lo.as_ptr().add(at), n), s.load_first(hi.as_ptr().add(at), n));
                let (c, d) =
                    (s.load_first(self.cos.as_ptr().add(at), n), s.load_first(self.sin.as_ptr().add(at), n));
                s.store_first(lo.as_mut_ptr().add(at), s.sub(s.mul(a, c), s.mul(b, d)), n);
                s.store_first(hi.as_mut_ptr().add(at), s.fma(b, c, s.mul(a, d)), n);
            }
            at += n;
        }
    }
}
