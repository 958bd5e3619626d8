//! Products of bf16 with AMX tiles, for any number of tokens.
//!
//! A tile of weights is 16 rows by 32 elements of K, straight from where they lie. The activations of 16 tokens are packed so that
//! their tile holds, row by row, one pair of elements of K for every token. The product is a tile `[16 rows, 16 tokens]`, which is transposed on
//! its way out. Two tiles of weights meet two of activations, so that each is used twice.
//!
//! An output depends on its own weight row and token alone, one step of 32 elements after the other, so the shape of the
//! tiles does not show in the bits.

mod tiles;

use std::{mem::MaybeUninit, sync::OnceLock};

use self::tiles::{Config, Hardware, Model, Tiles};
use super::{dot::Panel, format::K_ALIGN};
use crate::cpu::simd::{Avx512, Simd, prefetch};

/// Weight rows that are worked on at a time.
pub(super) const ROWS: usize = 32;
/// Tokens that are packed together.
pub(super) const GROUP: usize = 16;
/// Bytes of a step of K in a weight row.
const STEP: usize = 2 * K_ALIGN;

/// AMX with the vectors around it. The proof that this machine has both.
#[derive(Clone, Copy)]
pub(super) struct Amx(Hardware, Avx512);

impl Amx {
    /// # Safety
    /// [`works`] gave true, and the CPU has AVX-512 F, BW, DQ, VL and BF16.
    pub(super) unsafe fn new() -> Amx {
        // SAFETY: by the caller's word.
        unsafe { Amx(Hardware::new(), Avx512::new()) }
    }

    /// Packs up to [`GROUP`] tokens of `k` activations; each takes `k` rounded up to [`K_ALIGN`] elements of `out`.
    ///
    /// # Safety
    /// `out` has that room.
    pub(super) unsafe fn pack(self, x: &[f32], k: usize, out: *mut u8) {
        // SAFETY: by the caller's word; the value proves the instructions.
        unsafe { pack_group(self.1, x, k, out) }
    }

    /// # Safety
    /// See [`Panel`]; the tokens were packed in groups of [`GROUP`].
    pub(super) unsafe fn panel(mut self, p: Panel) {
        // SAFETY: by the caller's word; the value proves the instructions.
        unsafe { panel(self.1, &mut self.0, p) }
    }
}

/// Whether this CPU multiplies bf16 tiles, this process may use them, and they give what the model gives. Asked once.
pub(in crate::cpu) fn works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    // SAFETY: the tile instructions are tried only where CPU and system say that they are there.
    *WORKS.get_or_init(|| has_tiles() && system_allows() && unsafe { agrees_with_model() })
}

/// CPUID leaf 7: EDX bits 22 (AMX-BF16) and 24 (AMX-TILE), and the vectors that the code around the tiles needs.
fn has_tiles() -> bool {
    if !is_x86_feature_detected!("avx512bf16") || std::arch::x86_64::__cpuid(0).eax < 7 {
        return false;
    }
    let edx = std::arch::x86_64::__cpuid_count(7, 0).edx;
    edx >> 22 & 1 == 1 && edx >> 24 & 1 == 1
}

/// Asks Linux for the tile state (`ARCH_REQ_XCOMP_PERM` of `XFEATURE_XTILEDATA`, Documentation/arch/x86/xstate.rst), for the whole process.
#[cfg(target_os = "linux")]
fn system_allows() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: this call takes two integers, and only asks for a permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn system_allows() -> bool {
    false
}

/// Multiplies small integers, whose sums are exact in any order, on hardware and model.
///
/// # Safety
/// The CPU has AMX-TILE, AMX-BF16 and AVX-512 with BF16, and the system allows the tiles.
unsafe fn agrees_with_model() -> bool {
    let (k, rows, tokens) = (72, 37, 21);
    let small = |i: usize| ((i * 37 + i / 7) % 15) as f32 - 7.0;
    let w: Vec<u8> = (0..rows * k).flat_map(|i| half::bf16::from_f32(small(i)).to_le_bytes()).collect();
    let x: Vec<f32> = (0..tokens * k).map(|i| small(i + 3)).collect();
    // SAFETY: by the caller's word.
    unsafe {
        let s = Avx512::new();
        let hardware = product(s, &mut Hardware::new(), &w, &x, [rows, k]);
        hardware == product(s, &mut Model::new(), &w, &x, [rows, k])
    }
}

/// `x · wᵀ` for a whole small matrix.
///
/// # Safety
/// Tiles and vectors are there.
unsafe fn product<T: Tiles>(
    s: Avx512,
    tiles: &mut T,
    w: &[u8],
    x: &[f32],
    [rows, k]: [usize; 2],
) -> Vec<f32> {
    let tokens = x.len() / k;
    let x_stride = k.next_multiple_of(K_ALIGN) * 2;
    let mut packed = vec![0_u8; tokens * x_stride];
    let mut out = vec![f32::NAN; tokens * rows];
    // SAFETY: extents as allocated here.
    unsafe {
        for (group, x) in x.chunks(GROUP * k).enumerate() {
            pack_group(s, x, k, packed.as_mut_ptr().add(group * GROUP * x_stride));
        }
        let (x, w, out) = (packed.as_ptr(), w.as_ptr(), out.as_mut_ptr());
        panel(
            s,
            tiles,
            Panel { x, x_stride, tokens, w, rows, k, out, out_stride: rows, bias: None, add: false },
        );
    }
    out
}

/// See [`Amx::pack`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn pack_group(s: Avx512, x: &[f32], k: usize, out: *mut u8) {
    let tokens = x.len() / k;
    let mut at = 0;
    while at < k {
        let n = (k - at).min(K_ALIGN);
        let mut rows = [s.splat(0.0); GROUP];
        // SAFETY: n elements of each token are left; `out` has room for 16 pairs of every token from here on.
        unsafe {
            for (t, row) in rows.iter_mut().enumerate().take(tokens) {
                let from = x.as_ptr().add(t * k + at);
                *row = s.pack_bf16([
                    s.load_first(from, n.min(16)),
                    s.load_first(from.wrapping_add(16), n.saturating_sub(16)),
                ]);
            }
            for (i, pairs) in s.transpose(rows).into_iter().enumerate() {
                s.store_first(out.cast::<f32>().add((at / 2 + i) * tokens), pairs, tokens);
            }
        }
        at += K_ALIGN;
    }
}

/// Up to [`ROWS`] weight rows as the tiles read them: whole steps, then a last one that is padded with zeros.
struct Block<'a> {
    w: *const u8,
    stride: usize,
    /// Whole steps.
    steps: usize,
    /// The elements after them, of [`ROWS`] rows.
    edge: Option<&'a [u8; ROWS * STEP]>,
}

/// Computes a panel.
///
/// # Safety
/// See [`Panel`]; tiles and vectors are there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn panel<T: Tiles>(s: Avx512, tiles: &mut T, p: Panel) {
    let (stride, steps) = (p.k * 2, p.k / K_ALIGN);
    let mut edge = [0_u8; ROWS * STEP];
    let mut whole = Vec::new();
    let mut config = None;
    let mut n = 0;
    while n < p.rows {
        let rows = (p.rows - n).min(ROWS);
        let first = p.w.wrapping_add(n * stride);
        // SAFETY: `rows` rows of `k` elements from `first` on.
        unsafe {
            let block = if rows < ROWS {
                // Tiles always have 16 rows: the last few move to where zeros follow them.
                let padded = p.k.next_multiple_of(K_ALIGN) * 2;
                whole.resize(ROWS * padded, 0_u8);
                copy_rows(first, stride, rows, stride, whole.as_mut_ptr(), padded);
                Block { w: whole.as_ptr(), stride: padded, steps: padded / STEP, edge: None }
            } else if p.k.is_multiple_of(K_ALIGN) {
                Block { w: first, stride, steps, edge: None }
            } else {
                copy_rows(
                    first.add(steps * STEP),
                    stride,
                    rows,
                    stride - steps * STEP,
                    edge.as_mut_ptr(),
                    STEP,
                );
                Block { w: first, stride, steps, edge: Some(&edge) }
            };
            let mut t = 0;
            while t < p.tokens {
                let wanted = [(p.tokens - t).min(GROUP), (p.tokens - t).saturating_sub(GROUP).min(GROUP)];
                if config != Some(wanted) {
                    let [a, b] = wanted.map(|m| 4 * m);
                    tiles.configure(&Config::new([a, a, b, b, STEP, STEP, a, b]));
                    config = Some(wanted);
                }
                pair(s, tiles, p, &block, [n, rows], t, wanted);
                t += 2 * GROUP;
            }
        }
        n += ROWS;
    }
    if config.is_some() {
        // SAFETY: the tiles are configured.
        unsafe { tiles.release() };
    }
}

/// Copies `rows` rows of `bytes` bytes.
unsafe fn copy_rows(
    from: *const u8,
    stride: usize,
    rows: usize,
    bytes: usize,
    to: *mut u8,
    to_stride: usize,
) {
    for r in 0..rows {
        // SAFETY: by the caller's word.
        unsafe { std::ptr::copy_nonoverlapping(from.add(r * stride), to.add(r * to_stride), bytes) };
    }
}

/// A block of weight rows by two groups of tokens, of which the second may be empty.
#[inline(always)]
unsafe fn pair<T: Tiles>(
    s: Avx512,
    tiles: &mut T,
    p: Panel,
    block: &Block,
    [n, rows]: [usize; 2],
    t: usize,
    groups: [usize; 2],
) {
    let x = [p.x.wrapping_add(t * p.x_stride), p.x.wrapping_add((t + GROUP) * p.x_stride)];
    // The first tokens of a block ask for the next one, front to back.
    let ahead = if t == 0 { p.w.wrapping_add((n + ROWS) * block.stride) } else { std::ptr::null() };
    // SAFETY: the block holds ROWS rows of `steps` steps and an edge; the groups hold as many steps of their tokens.
    unsafe {
        tiles.zero::<0>();
        tiles.zero::<1>();
        if groups[1] > 0 {
            tiles.zero::<2>();
            tiles.zero::<3>();
        }
        for i in 0..block.steps + usize::from(block.edge.is_some()) {
            let (w, stride) = match block.edge {
                Some(edge) if i == block.steps => (edge.as_ptr(), STEP),
                _ => (block.w.add(i * STEP), block.stride),
            };
            tiles.load::<4>(w, stride);
            tiles.load::<5>(w.add(16 * stride), stride);
            tiles.load::<6>(x[0].add(i * STEP * groups[0]), 4 * groups[0]);
            tiles.dot::<0, 4, 6>();
            tiles.dot::<1, 5, 6>();
            if groups[1] > 0 {
                tiles.load::<7>(x[1].add(i * STEP * groups[1]), 4 * groups[1]);
                tiles.dot::<2, 4, 7>();
                tiles.dot::<3, 5, 7>();
            }
            if !ahead.is_null() {
                for line in 0..ROWS {
                    prefetch(ahead.wrapping_add((i * ROWS + line) * 64));
                }
            }
        }
        let mut c = [MaybeUninit::<[f32; 256]>::zeroed().assume_init(); 4];
        tiles.store::<0>(c[0].as_mut_ptr(), 64);
        tiles.store::<1>(c[1].as_mut_ptr(), 64);
        if groups[1] > 0 {
            tiles.store::<2>(c[2].as_mut_ptr(), 64);
            tiles.store::<3>(c[3].as_mut_ptr(), 64);
        }
        for (i, c) in c.iter().enumerate() {
            let (group, half) = (i / 2, i % 2 * 16);
            if groups[group] > 0 && half < rows {
                finish(s, p, c, [n + half, (rows - half).min(16)], [t + group * GROUP, groups[group]]);
            }
        }
    }
}

/// Writes a tile `[16 rows, tokens]` of sums to the outputs.
#[inline(always)]
unsafe fn finish(s: Avx512, p: Panel, c: &[f32; 256], [n, rows]: [usize; 2], [t, tokens]: [usize; 2]) {
    let mut lines = [s.splat(0.0); 16];
    // SAFETY: the array holds 16 vectors; outputs `n..n + rows` of tokens `t..t + tokens` belong to the panel, and the bias covers its rows.
    unsafe {
        for (i, line) in lines.iter_mut().enumerate() {
            *line = s.load(c.as_ptr().add(16 * i));
        }
        for (i, sums) in s.transpose(lines).into_iter().enumerate().take(tokens) {
            let out = p.out.add((t + i) * p.out_stride + n);
            let mut sums = sums;
            if let Some(bias) = p.bias {
                sums = s.add(sums, s.load_first(bias[n..n + rows].as_ptr(), rows));
            }
            if p.add {
                sums = s.add(s.load_first(out, rows), sums);
            }
            s.store_first(out, sums, rows);
        }
    }
}

#[cfg(test)]
mod tests;
