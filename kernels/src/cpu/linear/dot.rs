//! The inner loops: tiles of up to six tokens by four weight rows, every sum in a register of its own.

use std::mem::MaybeUninit;

use super::format::Format;
use crate::cpu::simd::prefetch;

/// A product of packed activations with consecutive weight rows.
///
/// # Safety
/// of those who compute it: the pointers are valid for the extents below, and no one else touches the outputs meanwhile.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    /// `[tokens, k]` packed activations.
    pub(super) x: *const u8,
    /// Bytes from one token to the next.
    pub(super) x_stride: usize,
    pub(super) tokens: usize,
    /// `[rows, k]` weights.
    pub(super) w: *const u8,
    pub(super) rows: usize,
    pub(super) k: usize,
    /// `[tokens, rows]`, the first of them.
    pub(super) out: *mut f32,
    /// Elements from one token to the next.
    pub(super) out_stride: usize,
    /// `[rows]`.
    pub(super) bias: Option<&'a [f32]>,
    /// Whether to add to `out` rather than to replace it.
    pub(super) add: bool,
}

/// Bytes of packed activations that a pass over the weight rows uses: they stay in the second-level cache.
const X_BLOCK: usize = 512 << 10;

/// Up to this many tokens, long rows are taken block by block, with the sums set aside in between: all tokens meet a block of weights while
/// it is in the first-level cache. More tokens hide the second-level cache by themselves.
const SPLIT_TOKENS: usize = 64;

/// Bytes of a weight row that are used at a time: with four rows, a quarter of the first-level cache, where they stay for all tokens.
const K_BLOCK: usize = 2048;

/// Elements of K per block. A sum that is set aside and taken up again has the same bits.
#[inline(always)]
fn k_block<F: Format>(p: &Panel) -> usize {
    let split = p.tokens <= SPLIT_TOKENS && p.k * F::W_SIZE * 2 > K_BLOCK * 3;
    if split { K_BLOCK / F::W_SIZE } else { p.k }
}

/// Computes a panel.
///
/// # Safety
/// See [`Panel`].
#[inline(always)]
pub(super) unsafe fn panel<F: Format>(f: F, p: Panel) {
    let block = (X_BLOCK / p.x_stride.max(1)).max(F::MAX_TOKENS);
    let blocks = p.tokens.div_ceil(block);
    let mut first = 0;
    for b in 0..blocks {
        let tokens = (p.tokens - first) / (blocks - b);
        // SAFETY: tokens `first..first + tokens` of the panel, whose pointers are valid.
        unsafe {
            let x = p.x.add(first * p.x_stride);
            let out = p.out.add(first * p.out_stride);
            rows(f, Panel { x, out, tokens, ..p });
        }
        first += tokens;
    }
}

/// Walks the weight rows, four at a time.
#[inline(always)]
unsafe fn rows<F: Format>(f: F, p: Panel) {
    let w_stride = p.k * F::W_SIZE;
    if p.tokens > STREAM_TOKENS {
        for at in (0..p.rows.min(rows_ahead(w_stride)) * w_stride).step_by(64) {
            prefetch(p.w.wrapping_add(at));
        }
    }
    let mut n = 0;
    // SAFETY: every call stays within rows `n..p.rows` of the panel.
    unsafe {
        while n + 4 <= p.rows {
            tokens::<F, 4>(f, p, n);
            n += 4;
        }
        while n < p.rows {
            tokens::<F, 1>(f, p, n);
            n += 1;
        }
    }
}

/// Up to this many tokens, rows are read one after the other: memory gives most when it is read front to back, and there is time
/// enough to reload the activations.
const STREAM_TOKENS: usize = 4;

/// Walks the tokens for rows `n..n + NR`, in tiles of nearly equal size.
#[inline(always)]
unsafe fn tokens<F: Format, const NR: usize>(f: F, p: Panel, n: usize) {
    // SAFETY: tokens `t..t + m` lie in the panel. Sizes that do not fit the registers of `F` are never asked for.
    unsafe {
        match p.tokens {
            1 => return stream::<F, 1, NR>(f, p, n),
            2 => return stream::<F, 2, NR>(f, p, n),
            3 if STREAM_TOKENS.min(F::MAX_TOKENS) >= 3 => return stream::<F, 3, NR>(f, p, n),
            4 if STREAM_TOKENS.min(F::MAX_TOKENS) >= 4 => return stream::<F, 4, NR>(f, p, n),
            _ => {}
        }
        let mut aside = [const { MaybeUninit::uninit() }; SPLIT_TOKENS * 4];
        let (tiles, block) = (p.tokens.div_ceil(F::MAX_TOKENS), k_block::<F>(&p));
        let mut from = 0;
        while from < p.k {
            let mut t = 0;
            for i in 0..tiles {
                let m = (p.tokens - t).div_ceil(tiles - i);
                let to = (from + block).min(p.k);
                let at = Place { i, t, n, from, to, aside: aside.as_mut_ptr() };
                match m {
                    1 => tile::<F, 1, NR>(f, p, at),
                    2 => tile::<F, 2, NR>(f, p, at),
                    3 if F::MAX_TOKENS >= 3 => tile::<F, 3, NR>(f, p, at),
                    4 if F::MAX_TOKENS >= 4 => tile::<F, 4, NR>(f, p, at),
                    5 if F::MAX_TOKENS >= 5 => tile::<F, 5, NR>(f, p, at),
                    6 if F::MAX_TOKENS >= 6 => tile::<F, 6, NR>(f, p, at),
                    _ => unreachable!("a tile of {m} tokens"),
                }
                t += m;
            }
            from += block;
        }
    }
}

/// `MR` tokens by `NR` rows, one row after the other: for weights that come from memory.
#[inline(always)]
unsafe fn stream<F: Format, const MR: usize, const NR: usize>(f: F, p: Panel, n: usize) {
    let w_stride = p.k * F::W_SIZE;
    let mut acc = [[f.zero(); NR]; MR];
    // SAFETY: `k` elements of each row and, padded to whole steps, of each token are readable.
    unsafe {
        for r in 0..NR {
            let w = p.w.add((n + r) * w_stride);
            let mut sums = [f.zero(); MR];
            let mut k = 0;
            while k + F::STEP <= p.k {
                let at = w.add(k * F::W_SIZE);
                prefetch(at.wrapping_add(AHEAD));
                let row = f.load_w(at);
                for m in 0..MR {
                    sums[m] = f.dot(sums[m], row, f.load_x(p.x.add(m * p.x_stride + k * F::X_SIZE)));
                }
                k += F::STEP;
            }
            if k < p.k {
                let row = f.load_w_tail(w.add(k * F::W_SIZE), p.k - k);
                for m in 0..MR {
                    sums[m] = f.dot(sums[m], row, f.load_x(p.x.add(m * p.x_stride + k * F::X_SIZE)));
                }
            }
            for m in 0..MR {
                acc[m][r] = sums[m];
            }
        }
        for m in 0..MR {
            store(f, p, acc[m], m, n);
        }
    }
}

/// Bytes that a stream of weights is asked for ahead of its use: measured best with pages of 4 KiB, harmless with huge ones.
const AHEAD: usize = 4096;

/// Rows between those that tiles work on and those that they ask for: 12 KiB or more, so that memory has time to answer.
#[inline(always)]
fn rows_ahead(w_stride: usize) -> usize {
    4 * (12_usize << 10).div_ceil(4 * w_stride.max(1))
}

/// Where a tile lies: number `i` of these rows, from token `t` and row `n` on, over elements `from..to` of K.
struct Place<Acc> {
    i: usize,
    t: usize,
    n: usize,
    from: usize,
    to: usize,
    /// Sums `[tokens, NR]` of the blocks of K before `from`.
    aside: *mut MaybeUninit<Acc>,
}

/// `MR` tokens by `NR` rows, all sums in registers. The first tiles ask for the rows that come next.
#[inline(always)]
unsafe fn tile<F: Format, const MR: usize, const NR: usize>(f: F, p: Panel, at: Place<F::Acc>) {
    let Place { i, t, n, from, to, aside } = at;
    let w_stride = p.k * F::W_SIZE;
    // Two lines a step: after two tiles, this block of all four rows is on its way.
    let then = n + rows_ahead(w_stride);
    let next = p.w.wrapping_add(then * w_stride + from * F::W_SIZE * NR);
    let (mut ahead, stride) = if i < 2 && then < p.rows {
        (next.wrapping_add(i * 2 * (to - from) * F::W_SIZE), 64)
    } else {
        (p.w, 0)
    };
    let mut acc = [[f.zero(); NR]; MR];
    // SAFETY: `k` elements of each row and, padded to whole steps, of each token are readable; what lies aside was put there by the block before.
    unsafe {
        if from > 0 {
            for m in 0..MR {
                for r in 0..NR {
                    acc[m][r] = (*aside.add((t + m) * NR + r)).assume_init();
                }
            }
        }
        let x = p.x.add(t * p.x_stride);
        let w = p.w.add(n * w_stride);
        let mut k = from;
        while k + F::STEP <= to {
            let mut xs = [f.load_x(x.add(k * F::X_SIZE)); MR];
            for m in 1..MR {
                xs[m] = f.load_x(x.add(m * p.x_stride + k * F::X_SIZE));
            }
            prefetch(ahead);
            prefetch(ahead.wrapping_add(stride));
            ahead = ahead.wrapping_add(2 * stride);
            for r in 0..NR {
                let row = f.load_w(w.add(r * w_stride + k * F::W_SIZE));
                for m in 0..MR {
                    acc[m][r] = f.dot(acc[m][r], row, xs[m]);
                }
            }
            k += F::STEP;
        }
        if k < to {
            for r in 0..NR {
                let row = f.load_w_tail(w.add(r * w_stride + k * F::W_SIZE), to - k);
                for m in 0..MR {
                    acc[m][r] = f.dot(acc[m][r], row, f.load_x(x.add(m * p.x_stride + k * F::X_SIZE)));
                }
            }
        }
        for m in 0..MR {
            if to == p.k {
                store(f, p, acc[m], t + m, n);
            } else {
                for r in 0..NR {
                    (*aside.add((t + m) * NR + r)).write(acc[m][r]);
                }
            }
        }
    }
}

/// Finishes the sums of one token and writes them.
#[inline(always)]
unsafe fn store<F: Format, const NR: usize>(f: F, p: Panel, acc: [F::Acc; NR], t: usize, n: usize) {
    let mut r = 0;
    while r < NR {
        let mut four = [f.zero(); 4];
        let count = if NR - r < 4 { NR - r } else { 4 };
        for (four, acc) in four.iter_mut().zip(&acc[r..r + count]) {
            *four = *acc;
        }
        let mut sums = f.sum4(four);
        if let Some(bias) = p.bias {
            for i in 0..count {
                sums[i] += bias[n + r + i];
            }
        }
        // SAFETY: outputs `n + r..n + r + count` of token `t` belong to the panel.
        unsafe {
            let out = p.out.add(t * p.out_stride + n + r);
            for i in 0..count {
                let old = if p.add { *out.add(i) } else { 0.0 };
                *out.add(i) = if p.add { old + sums[i] } else { sums[i] };
            }
        }
        r += 4;
    }
}
