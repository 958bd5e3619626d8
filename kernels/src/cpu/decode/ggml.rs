//! Blocks of GGML, which hold their scales themselves: `ggml-common.h` defines them, `ggml-quants.c` what they mean.

use super::{Row, Sink, widen};
use crate::cpu::simd::Simd;

/// # Safety
/// of all functions here: `out` has room for the row.
#[inline(always)]
pub(super) unsafe fn q4_0<S: Simd, T: Sink<S>>(s: S, sink: T, row: Row, out: *mut u8) {
    for (i, block) in row.data.as_chunks::<18>().0.iter().enumerate() {
        let mut q = [0_i8; 32];
        for l in 0..16 {
            q[l] = (block[2 + l] & 15) as i8 - 8;
            q[16 + l] = (block[2 + l] >> 4) as i8 - 8;
        }
        // SAFETY: 32 integers of this block; there is room for the row. So below.
        unsafe { widen(s, sink, q.as_ptr(), 32, [f16(block, 0), 0.0], out.add(i * 32 * T::SIZE)) };
    }
}

#[inline(always)]
pub(super) unsafe fn q8_0<S: Simd, T: Sink<S>>(s: S, sink: T, row: Row, out: *mut u8) {
    for (i, block) in row.data.as_chunks::<34>().0.iter().enumerate() {
        let q = block[2..].as_ptr().cast();
        // SAFETY: as above.
        unsafe { widen(s, sink, q, 32, [f16(block, 0), 0.0], out.add(i * 32 * T::SIZE)) };
    }
}

/// Block: d, dmin (f16), 12 bytes of scales and minima, 128 bytes of 4 bits. Pairs of groups of 32 share 32 bytes.
#[inline(always)]
pub(super) unsafe fn q4_k<S: Simd, T: Sink<S>>(s: S, sink: T, row: Row, out: *mut u8) {
    for (i, block) in row.data.as_chunks::<144>().0.iter().enumerate() {
        let affine = scales_and_minima(block);
        for j in 0..4 {
            let mut q = [[0_i8; 32]; 2];
            for (l, b) in block[16 + 32 * j..48 + 32 * j].iter().enumerate() {
                q[0][l] = (b & 15) as i8;
                q[1][l] = (b >> 4) as i8;
            }
            for (half, q) in q.iter().enumerate() {
                let at = i * 256 + 64 * j + 32 * half;
                // SAFETY: as above.
                unsafe { widen(s, sink, q.as_ptr(), 32, affine[2 * j + half], out.add(at * T::SIZE)) };
            }
        }
    }
}

/// As `q4_k`, with 32 bytes between scales and data: bit `g` of byte `l` is the fifth bit of weight `l` of group `g`.
#[inline(always)]
pub(super) unsafe fn q5_k<S: Simd, T: Sink<S>>(s: S, sink: T, row: Row, out: *mut u8) {
    for (i, block) in row.data.as_chunks::<176>().0.iter().enumerate() {
        let affine = scales_and_minima(block);
        let fifth = &block[16..48];
        for j in 0..4 {
            let mut q = [[0_i8; 32]; 2];
            let bytes = &block[48 + 32 * j..80 + 32 * j];
            for l in 0..32 {
                q[0][l] = (bytes[l] & 15 | (fifth[l] >> (2 * j) & 1) << 4) as i8;
                q[1][l] = (bytes[l] >> 4 | (fifth[l] >> (2 * j + 1) & 1) << 4) as i8;
            }
            for (half, q) in q.iter().enumerate() {
                let at = i * 256 + 64 * j + 32 * half;
                // SAFETY: as above.
                unsafe { widen(s, sink, q.as_ptr(), 32, affine[2 * j + half], out.add(at * T::SIZE)) };
            }
        }
    }
}

/// Scale and offset of each of eight groups: 6 bits of scale and of minimum, of which the last four groups' lie apart.
#[inline(always)]
fn scales_and_minima<const N: usize>(block: &[u8; N]) -> [[f32; 2]; 8] {
    let (d, dmin, packed) = (f16(block, 0), f16(block, 2), &block[4..16]);
    let mut all = [[0.0; 2]; 8];
    for g in 0..4 {
        let (scale, minimum) = (packed[g] & 63, packed[g + 4] & 63);
        all[g] = [d * f32::from(scale), -dmin * f32::from(minimum)];
        let scale = packed[g + 8] & 15 | packed[g] >> 6 << 4;
        let minimum = packed[g + 8] >> 4 | packed[g + 4] >> 6 << 4;
        all[g + 4] = [d * f32::from(scale), -dmin * f32::from(minimum)];
    }
    all
}

/// Block: 128 bytes of the low 4 bits, 64 of the high 2, 16 signed scales, d (f16). Each half of a block has 64, 32 and 8 of these.
#[inline(always)]
pub(super) unsafe fn q6_k<S: Simd, T: Sink<S>>(s: S, sink: T, row: Row, out: *mut u8) {
    for (i, block) in row.data.as_chunks::<210>().0.iter().enumerate() {
        let d = f16(block, 208);
        for half in 0..2 {
            let (low, high) = (&block[64 * half..64 * half + 64], &block[128 + 32 * half..160 + 32 * half]);
            let mut q = [0_i8; 128];
            for l in 0..32 {
                q[l] = (low[l] & 15 | (high[l] & 3) << 4) as i8 - 32;
                q[l + 32] = (low[l + 32] & 15 | (high[l] >> 2 & 3) << 4) as i8 - 32;
                q[l + 64] = (low[l] >> 4 | (high[l] >> 4 & 3) << 4) as i8 - 32;
                q[l + 96] = (low[l + 32] >> 4 | (high[l] >> 6) << 4) as i8 - 32;
            }
            for (g, q) in q.chunks_exact(16).enumerate() {
                let scale = d * f32::from(block[192 + 8 * half + g] as i8);
                let at = i * 256 + 128 * half + 16 * g;
                // SAFETY: as above.
                unsafe { widen(s, sink, q.as_ptr(), 16, [scale, 0.0], out.add(at * T::SIZE)) };
            }
        }
    }
}

/// The f16 at byte `at`, widened without a look at what the CPU has.
#[inline(always)]
fn f16(block: &[u8], at: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
    let magnitude = bits & 0x7fff;
    // Exponent and mantissa in the place of an f32's, whose bias is greater by 112; also right for subnormals.
    let value = if magnitude < 0x7c00 {
        f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23)
    } else {
        f32::from_bits(0x7f80_0000 | (magnitude & 0x3ff) << 13)
    };
    f32::from_bits(value.to_bits() | (bits & 0x8000) << 16)
}
