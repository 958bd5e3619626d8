//! The inner loops: tiles of up to six tokens by four weight rows, every sum in a register of its own.

use super::format::Format;

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
        let tiles = p.tokens.div_ceil(F::MAX_TOKENS);
        let mut t = 0;
        for i in 0..tiles {
            let m = (p.tokens - t).div_ceil(tiles - i);
            match m {
                1 => tile::<F, 1, NR>(f, p, t, n),
                2 => tile::<F, 2, NR>(f, p, t, n),
                3 if F::MAX_TOKENS >= 3 => tile::<F, 3, NR>(f, p, t, n),
                4 if F::MAX_TOKENS >= 4 => tile::<F, 4, NR>(f, p, t, n),
                5 if F::MAX_TOKENS >= 5 => tile::<F, 5, NR>(f, p, t, n),
                6 if F::MAX_TOKENS >= 6 => tile::<F, 6, NR>(f, p, t, n),
                _ => unreachable!("a tile of {m} tokens"),
            }
            t += m;
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

/// Asks for the line at `p`, which may be any address, to come into the second-level cache.
#[inline(always)]
fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// `MR` tokens from `t` by `NR` rows from `n`, all sums in registers. The first tile of a row asks for the rows that come next.
#[inline(always)]
unsafe fn tile<F: Format, const MR: usize, const NR: usize>(f: F, p: Panel, t: usize, n: usize) {
    let w_stride = p.k * F::W_SIZE;
    let ahead = if t == 0 { NR * w_stride } else { 0 };
    let mut acc = [[f.zero(); NR]; MR];
    // SAFETY: `k` elements of each row and, padded to whole steps, of each token are readable.
    unsafe {
        let x = p.x.add(t * p.x_stride);
        let w = p.w.add(n * w_stride);
        let mut k = 0;
        while k + F::STEP <= p.k {
            let mut xs = [f.load_x(x.add(k * F::X_SIZE)); MR];
            for m in 1..MR {
                xs[m] = f.load_x(x.add(m * p.x_stride + k * F::X_SIZE));
            }
            for r in 0..NR {
                let at = w.add(r * w_stride + k * F::W_SIZE);
                prefetch(at.wrapping_add(ahead));
                let row = f.load_w(at);
                for m in 0..MR {
                    acc[m][r] = f.dot(acc[m][r], row, xs[m]);
                }
            }
            k += F::STEP;
        }
        if k < p.k {
            for r in 0..NR {
                let row = f.load_w_tail(w.add(r * w_stride + k * F::W_SIZE), p.k - k);
                for m in 0..MR {
                    acc[m][r] = f.dot(acc[m][r], row, f.load_x(x.add(m * p.x_stride + k * F::X_SIZE)));
                }
            }
        }
        for m in 0..MR {
            store(f, p, acc[m], t + m, n);
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
