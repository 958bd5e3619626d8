//! Formats whose scales stand beside the data, and MX.

use super::{Row, Sink, widen};
use crate::{cpu::simd::Simd, tensor::QuantFormat};

/// Columns that are taken apart at a time.
const STEP: usize = 64;

/// Vectors are at most this wide.
const LANES: usize = 16;

/// # Safety
/// of all functions here: `out` has room for the row and [`super::SLACK`] elements.
#[inline(always)]
pub(super) unsafe fn int8<S: Simd, T: Sink<S>>(s: S, sink: T, row: Row, group: usize, out: *mut u8) {
    let k = row.m.k;
    let groups = k.div_ceil(group);
    for g in 0..groups {
        let (from, to) = (g * group, k.min(g * group + group));
        let affine = [row.m.scale(row.n * groups + g), row.m.offset(row.n * groups + g)];
        let whole = (to - from) / LANES * LANES;
        let (data, tail) = row.data[from..to].split_at(whole);
        // SAFETY: whole vectors of the data; then the tail, padded; there is room for both.
        unsafe {
            widen(s, sink, data.as_ptr().cast(), whole, affine, out.add(from * T::SIZE));
            if !tail.is_empty() {
                let tail = padded(tail);
                widen(s, sink, tail.as_ptr().cast(), LANES, affine, out.add((from + whole) * T::SIZE));
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn int4<S: Simd, T: Sink<S>>(s: S, sink: T, row: Row, group: usize, out: *mut u8) {
    let k = row.m.k;
    let groups = k.div_ceil(group);
    for g in 0..groups {
        let (from, to) = (g * group, k.min(g * group + group));
        let affine = [row.m.scale(row.n * groups + g), row.m.offset(row.n * groups + g)];
        let mut q: [i8; STEP];
        let mut at = from;
        while at < to {
            let n = STEP.min(to - at);
            let bytes = &row.data[at / 2..(at + n) / 2];
            match bytes.first_chunk::<{ STEP / 2 }>() {
                Some(bytes) => q = nibbles(bytes),
                None => {
                    let mut rest = [0; STEP / 2];
                    rest[..bytes.len()].copy_from_slice(bytes);
                    q = nibbles(&rest);
                }
            }
            // SAFETY: the array holds whole vectors; fewer than a vector is written beyond `to`.
            unsafe { widen(s, sink, q.as_ptr(), n, affine, out.add(at * T::SIZE)) };
            at += n;
        }
    }
}

/// The low halves of bytes to even places, the high halves to odd ones.
#[inline(always)]
fn nibbles<const B: usize, const N: usize>(bytes: &[u8; B]) -> [i8; N] {
    const { assert!(N == 2 * B) };
    let mut q = [0; N];
    for i in 0..B {
        q[2 * i] = (bytes[i] & 15) as i8;
        q[2 * i + 1] = (bytes[i] >> 4) as i8;
    }
    q
}

#[inline(always)]
pub(super) unsafe fn fp8<S: Simd, T: Sink<S>>(s: S, sink: T, row: Row, out: *mut u8) {
    let QuantFormat::Fp8 { rows, columns } = row.m.format else { return };
    let k = row.m.k;
    let groups = k.div_ceil(columns);
    for g in 0..groups {
        let (from, to) = (g * columns, k.min(g * columns + columns));
        let scale = s.splat(row.m.scale(row.n / rows * groups + g));
        let mut at = from;
        while at < to {
            let n = S::LANES.min(to - at);
            // SAFETY: a whole vector of the data, or the tail, padded; fewer than a vector is written beyond `to`.
            unsafe {
                let v = if n == S::LANES {
                    s.load_f8(row.data.as_ptr().add(at))
                } else {
                    s.load_f8(padded(&row.data[at..to]).as_ptr())
                };
                sink.put(s, out.add(at * T::SIZE), s.mul(v, scale));
            }
            at += n;
        }
    }
}

/// Up to a vector of bytes, then zeros.
#[inline(always)]
fn padded(bytes: &[u8]) -> [u8; LANES] {
    let mut all = [0; LANES];
    all[..bytes.len()].copy_from_slice(bytes);
    all
}

#[inline(always)]
pub(super) unsafe fn mxfp4<S: Simd, T: Sink<S>>(s: S, sink: T, row: Row, out: *mut u8) {
    for (i, block) in row.data.as_chunks::<17>().0.iter().enumerate() {
        let Some(bytes) = block.last_chunk::<16>() else { continue };
        let mut q: [i8; 32] = nibbles(bytes);
        for q in &mut q {
            *q = doubled_e2m1(*q);
        }
        // SAFETY: 32 integers of this block; there is room for the row.
        unsafe { widen(s, sink, q.as_ptr(), 32, [half_scale(block[0]), 0.0], out.add(i * 32 * T::SIZE)) };
    }
}

/// Twice the value of an E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives): an integer.
#[inline(always)]
fn doubled_e2m1(code: i8) -> i8 {
    let m = code & 7;
    let magnitude = m + (m == 5) as i8 + 2 * (m == 6) as i8 + 5 * (m == 7) as i8;
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// `2^(byte - 128)`. The code 255 is no number.
#[inline(always)]
fn half_scale(byte: u8) -> f32 {
    match byte {
        255 => f32::NAN,
        0 => f32::from_bits(1 << 21),
        1 => f32::from_bits(1 << 22),
        _ => f32::from_bits((u32::from(byte) - 1) << 23),
    }
}
