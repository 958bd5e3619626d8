//! The two products of attention, over keys and values as they lie in the cache.

use super::super::simd::Simd;

/// Storage of a cache.
pub(super) trait KvElement {
    const SIZE: usize;
    /// # Safety
    /// `p` is valid for the first `n` of `LANES` elements.
    unsafe fn load<S: Simd>(s: S, p: *const u8, n: usize) -> S::F;
}

pub(super) struct F32Kv;
pub(super) struct Bf16Kv;
pub(super) struct F8Kv;

impl KvElement for F32Kv {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8, n: usize) -> S::F {
        // SAFETY: by the caller's word.
        unsafe { if n == S::LANES { s.load(p.cast()) } else { s.load_first(p.cast(), n) } }
    }
}

impl KvElement for Bf16Kv {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8, n: usize) -> S::F {
        // SAFETY: by the caller's word.
        unsafe { if n == S::LANES { s.load_bf16(p) } else { s.load_bf16_first(p, n) } }
    }
}

impl KvElement for F8Kv {
    const SIZE: usize = 1;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8, n: usize) -> S::F {
        // SAFETY: by the caller's word.
        unsafe { if n == S::LANES { s.load_f8(p) } else { s.load_f8_first(p, n) } }
    }
}

/// Up to `LANES` consecutive keys of one block.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    /// First key: element `d` of key `j` is at `d * block_size + j`.
    pub(super) keys: *const u8,
    /// First value: element `d` of value `j` is at `j * D + d`.
    pub(super) values: *const u8,
    /// Position of the first key.
    pub(super) start: usize,
    /// Number of keys.
    pub(super) len: usize,
}

/// Scores of `QT` queries with two vectors of keys: even and odd elements of the head in sums of their own.
#[inline(always)]
pub(super) unsafe fn scores<S: Simd, E: KvElement, const QT: usize>(
    s: S,
    q: &[f32],
    pair: [Keys; 2],
    d: usize,
    block_size: usize,
) -> [[S::F; 2]; QT] {
    let mut acc = [[[s.splat(0.0); 2]; 2]; QT];
    let full = pair[0].len == S::LANES && pair[1].len == S::LANES;
    let len = if full { [S::LANES; 2] } else { [pair[0].len, pair[1].len] };
    let stride = block_size * E::SIZE;
    let q = q.as_ptr();
    let mut at = 0;
    while at < d {
        for odd in 0..2 {
            // SAFETY: element `at + odd` exists, as D is even; `len` keys of each vector do.
            unsafe {
                let (k0, k1) = if full {
                    (
                        E::load(s, pair[0].keys.add((at + odd) * stride), S::LANES),
                        E::load(s, pair[1].keys.add((at + odd) * stride), S::LANES),
                    )
                } else {
                    (
                        E::load(s, pair[0].keys.add((at + odd) * stride), len[0]),
                        if len[1] == 0 {
                            s.splat(0.0)
                        } else {
                            E::load(s, pair[1].keys.add((at + odd) * stride), len[1])
                        },
                    )
                };
                for i in 0..QT {
                    let x = s.splat(*q.add(i * d + at + odd));
                    acc[i][odd][0] = s.fma(x, k0, acc[i][odd][0]);
                    acc[i][odd][1] = s.fma(x, k1, acc[i][odd][1]);
                }
            }
        }
        at += 2;
    }
    let mut out = [[s.splat(0.0); 2]; QT];
    for i in 0..QT {
        out[i] = [s.add(acc[i][0][0], acc[i][1][0]), s.add(acc[i][0][1], acc[i][1][1])];
    }
    out
}

/// Which keys of a pair of vectors a query sees: of each vector, the first and the end.
pub(super) type Seen = [[usize; 2]; 2];

/// `acc = acc * decay + Σ weight * value` over the keys that each query has seen, all of them from the first on.
#[inline(always)]
pub(super) unsafe fn values<S: Simd, E: KvElement, const QT: usize>(
    s: S,
    acc: &mut [f32],
    weights: &[f32],
    pair: [Keys; 2],
    seen: &[Seen; QT],
    decay: &[f32; QT],
    d: usize,
) {
    let ends = |i: usize| seen[i].map(|range| range[1]);
    // Keys that all queries see go side by side; those that only later queries see follow query by query.
    let mut common = ends(0);
    for i in 1..QT {
        common = [common[0].min(ends(i)[0]), common[1].min(ends(i)[1])];
    }
    let mut from = [[0, common[0]], [0, common[1]]];
    // SAFETY: by the caller's word; `from` never passes the number of keys of a vector.
    unsafe {
        weigh::<S, E, QT>(s, acc.as_mut_ptr(), weights.as_ptr(), pair, from, decay, d);
        for i in 0..QT {
            if ends(i) != common {
                from = [[common[0], ends(i)[0]], [common[1], ends(i)[1]]];
                let acc = acc.as_mut_ptr().add(i * d);
                let weights = weights.as_ptr().add(i * 2 * S::LANES);
                weigh::<S, E, 1>(s, acc, weights, pair, from, &[1.0], d);
            }
        }
    }
}

/// [`values`] where queries also differ in the first key that they see.
#[inline(always)]
pub(super) unsafe fn values_between<S: Simd, E: KvElement, const QT: usize>(
    s: S,
    acc: &mut [f32],
    weights: &[f32],
    pair: [Keys; 2],
    seen: &[Seen; QT],
    decay: &[f32; QT],
    d: usize,
) {
    // SAFETY: by the caller's word.
    unsafe {
        if seen.iter().all(|s| *s == seen[0]) {
            weigh::<S, E, QT>(s, acc.as_mut_ptr(), weights.as_ptr(), pair, seen[0], decay, d);
            return;
        }
        // Seldom: at the ends of a window and of the context.
        for i in 0..QT {
            let acc = acc.as_mut_ptr().add(i * d);
            let weights = weights.as_ptr().add(i * 2 * S::LANES);
            weigh::<S, E, 1>(s, acc, weights, pair, seen[i], &[decay[i]], d);
        }
    }
}

/// [`values`] where the first `l` elements of a key are its value. Weights of keys that a query has not seen are 0.
#[inline(always)]
pub(super) unsafe fn values_of_keys<S: Simd, E: KvElement, const QT: usize>(
    s: S,
    acc: &mut [f32],
    weights: &[f32],
    pair: [Keys; 2],
    seen: &[Seen; QT],
    decay: &[f32; QT],
    [l, block_size]: [usize; 2],
) {
    let zero = s.splat(0.0);
    for at in (0..l).step_by(4) {
        let count = (l - at).min(4);
        let mut keys = [[zero; 2]; 4];
        for c in 0..count {
            for g in 0..2 {
                if pair[g].len > 0 {
                    let p = pair[g].keys.wrapping_add((at + c) * block_size * E::SIZE);
                    // SAFETY: element `at + c` of `len` keys is in the cache.
                    keys[c][g] = unsafe { E::load(s, p, pair[g].len) };
                }
            }
        }
        for i in 0..QT {
            if seen[i][0][1] == 0 {
                continue;
            }
            let weights = weights[2 * i * S::LANES..].as_ptr();
            // SAFETY: there are two vectors for each query.
            let (a, b) = unsafe { (s.load(weights), s.load(weights.add(S::LANES))) };
            // From zero on, so that a key that is not seen and one that is not there leave the same bits.
            let mut sums = [zero; 4];
            for c in 0..4 {
                sums[c] = s.fma(b, keys[c][1], s.fma(a, keys[c][0], zero));
            }
            for (acc, sum) in acc[i * l + at..][..count].iter_mut().zip(s.sum4(sums)) {
                *acc = *acc * decay[i] + sum;
            }
        }
    }
}

/// Walks the head in chunks of four vectors, then single ones.
#[inline(always)]
unsafe fn weigh<S: Simd, E: KvElement, const QT: usize>(
    s: S,
    acc: *mut f32,
    weights: *const f32,
    pair: [Keys; 2],
    range: [[usize; 2]; 2],
    decay: &[f32; QT],
    d: usize,
) {
    let mut at = 0;
    // SAFETY: elements `at..` of the head up to D, by the caller's word.
    unsafe {
        while at + 4 * S::LANES <= d {
            weigh_chunk::<S, E, QT, 4>(s, acc.add(at), weights, pair, range, decay, [d, at, S::LANES]);
            at += 4 * S::LANES;
        }
        while at < d {
            let n = (d - at).min(S::LANES);
            weigh_chunk::<S, E, QT, 1>(s, acc.add(at), weights, pair, range, decay, [d, at, n]);
            at += n;
        }
    }
}

/// `CH` vectors of the head, starting at element `at`, of which the last has `n` elements.
#[inline(always)]
unsafe fn weigh_chunk<S: Simd, E: KvElement, const QT: usize, const CH: usize>(
    s: S,
    acc: *mut f32,
    weights: *const f32,
    pair: [Keys; 2],
    range: [[usize; 2]; 2],
    decay: &[f32; QT],
    [d, at, n]: [usize; 3],
) {
    let mut sums = [[s.splat(0.0); CH]; QT];
    // SAFETY: by the caller's word.
    unsafe {
        for i in 0..QT {
            for c in 0..CH {
                let old = s.load_first(acc.add(i * d + c * S::LANES), n);
                sums[i][c] = s.mul(old, s.splat(decay[i]));
            }
        }
        for (g, keys) in pair.iter().enumerate() {
            for j in range[g][0]..range[g][1] {
                let row = keys.values.add((j * d + at) * E::SIZE);
                let mut v = [s.splat(0.0); CH];
                for c in 0..CH {
                    let len = if CH == 1 { n } else { S::LANES };
                    v[c] = E::load(s, row.add(c * S::LANES * E::SIZE), len);
                }
                for i in 0..QT {
                    let x = s.splat(*weights.add((2 * i + g) * S::LANES + j));
                    for c in 0..CH {
                        sums[i][c] = s.fma(x, v[c], sums[i][c]);
                    }
                }
            }
        }
        for i in 0..QT {
            for c in 0..CH {
                s.store_first(acc.add(i * d + c * S::LANES), sums[i][c], n);
            }
        }
    }
}
