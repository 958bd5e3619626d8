//! Tiles of keys and values, widened to f32.

use super::{
    super::simd::Simd,
    products::{Bf16Kv, F8Kv, Keys, KvElement},
};
use crate::tensor::DType;

/// The keys of a pair of vectors as f32 `[d, 2 * LANES]` in `out`, and the elements from one of its rows to the next. f32 keys stay where they are, in
/// rows of `block_size`.
///
/// # Safety
/// The keys are in the cache, `out` has that room, and nobody writes to it while the keys are used.
#[inline(always)]
pub(super) unsafe fn keys<S: Simd>(
    s: S,
    dtype: DType,
    pair: [Keys; 2],
    [d, block_size]: [usize; 2],
    out: *mut f32,
) -> ([Keys; 2], usize) {
    // SAFETY: by the caller's word.
    unsafe {
        match dtype {
            DType::Bf16 => widen_keys::<S, Bf16Kv>(s, pair, [d, block_size], out),
            DType::F8E4M3 => widen_keys::<S, F8Kv>(s, pair, [d, block_size], out),
            _ => return (pair, block_size),
        }
    }
    let at = |g: usize| out.wrapping_add(g * S::LANES).cast::<u8>().cast_const();
    ([Keys { keys: at(0), ..pair[0] }, Keys { keys: at(1), ..pair[1] }], 2 * S::LANES)
}

#[inline(always)]
unsafe fn widen_keys<S: Simd, E: KvElement>(
    s: S,
    pair: [Keys; 2],
    [d, block_size]: [usize; 2],
    out: *mut f32,
) {
    for g in 0..2 {
        if pair[g].len == 0 {
            continue;
        }
        for at in 0..d {
            // SAFETY: element `at` of `len` keys is in the cache; `out` has two vectors for it.
            unsafe {
                let key = E::load(s, pair[g].keys.add(at * block_size * E::SIZE), pair[g].len);
                s.store(out.add((2 * at + g) * S::LANES), key);
            }
        }
    }
}

/// The values of a pair of vectors of keys as f32 `[2 * LANES, d]` in `out`.
///
/// # Safety
/// As for [`keys`].
#[inline(always)]
pub(super) unsafe fn values<S: Simd>(
    s: S,
    dtype: DType,
    pair: [Keys; 2],
    d: usize,
    out: *mut f32,
) -> [Keys; 2] {
    // SAFETY: by the caller's word.
    unsafe {
        match dtype {
            DType::Bf16 => widen_values::<S, Bf16Kv>(s, pair, d, out),
            DType::F8E4M3 => widen_values::<S, F8Kv>(s, pair, d, out),
            _ => return pair,
        }
    }
    let at = |g: usize| out.wrapping_add(g * S::LANES * d).cast::<u8>().cast_const();
    [Keys { values: at(0), ..pair[0] }, Keys { values: at(1), ..pair[1] }]
}

#[inline(always)]
unsafe fn widen_values<S: Simd, E: KvElement>(s: S, pair: [Keys; 2], d: usize, out: *mut f32) {
    for g in 0..2 {
        for j in 0..pair[g].len {
            let mut at = 0;
            while at < d {
                let n = (d - at).min(S::LANES);
                // SAFETY: elements `at..at + n` of value `j` are in the cache; `out` has room for that many values.
                unsafe {
                    let value = E::load(s, pair[g].values.add((j * d + at) * E::SIZE), n);
                    s.store_first(out.add((g * S::LANES + j) * d + at), value, n);
                }
                at += n;
            }
        }
    }
}
