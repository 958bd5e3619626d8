//! Vectors as arrays: the compiler makes of them what the build target has.

use super::Simd;
use crate::tensor::f8_to_f32;

/// Eight lanes of plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

const L: usize = 8;

#[inline(always)]
fn map2(a: [f32; L], b: [f32; L], f: impl Fn(f32, f32) -> f32) -> [f32; L] {
    let mut out = a;
    for i in 0..L {
        out[i] = f(a[i], b[i]);
    }
    out
}

/// `2^n` for integral `n` in -126..=127.
#[inline(always)]
fn pow2(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

impl Simd for Portable {
    type F = [f32; L];
    const LANES: usize = L;
    const QUERIES: usize = 2;

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        [v; L]
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let mut out = c;
        for i in 0..L {
            // Where the build target has no fused instruction, `mul_add` would be a library call.
            let fused = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
            out[i] = if fused { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] };
        }
        out
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // Adding 1.5 * 2^23 leaves no fraction bits: rounding in hardware, for |a| < 2^22.
        map2(a, a, |a, _| (a + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    fn scale2(self, a: Self::F, n: Self::F) -> Self::F {
        map2(a, n, |a, n| {
            let n = n as i32;
            let half = n >> 1;
            a * pow2(half) * pow2(n - half)
        })
    }
    #[inline(always)]
    fn round_bf16(self, a: Self::F) -> Self::F {
        map2(a, a, |a, _| {
            let bits = a.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
            f32::from_bits(if a.is_nan() { 0x7fc0_0000 } else { rounded })
        })
    }
    #[inline(always)]
    fn keep_first(self, a: Self::F, n: usize, fill: f32) -> Self::F {
        let mut out = [fill; L];
        out[..n].copy_from_slice(&a[..n]);
        out
    }
    #[inline(always)]
    fn drop_first(self, a: Self::F, n: usize, fill: f32) -> Self::F {
        let mut out = a;
        out[..n].fill(fill);
        out
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        let [b0, b1, b2, b3] = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
        (b0 + b2) + (b1 + b3)
    }
    #[inline(always)]
    fn sum4(self, a: [Self::F; 4]) -> [f32; 4] {
        [self.sum(a[0]), self.sum(a[1]), self.sum(a[2]), self.sum(a[3])]
    }
    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        let b = [a[0].max(a[4]), a[1].max(a[5]), a[2].max(a[6]), a[3].max(a[7])];
        b[0].max(b[2]).max(b[1].max(b[3]))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's pointer is valid for LANES elements; an array of f32 has no padding.
        unsafe { p.cast::<[f32; L]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::F {
        let mut out = [0.0; L];
        for (i, o) in out.iter_mut().enumerate().take(n) {
            // SAFETY: i < n, and the caller's pointer is valid for n elements.
            *o = unsafe { p.add(i).read_unaligned() };
        }
        out
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::F) {
        // SAFETY: the caller's pointer is valid for LANES elements.
        unsafe { p.cast::<[f32; L]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, v: Self::F, n: usize) {
        for (i, v) in v.iter().enumerate().take(n) {
            // SAFETY: i < n, and the caller's pointer is valid for n elements.
            unsafe { p.add(i).write_unaligned(*v) };
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> Self::F {
        // SAFETY: the caller's pointer is valid for LANES bf16.
        let raw = unsafe { p.cast::<[u16; L]>().read_unaligned() };
        let mut out = [0.0; L];
        for i in 0..L {
            out[i] = f32::from_bits(u32::from(u16::from_le(raw[i])) << 16);
        }
        out
    }
    #[inline(always)]
    unsafe fn load_bf16_first(self, p: *const u8, n: usize) -> Self::F {
        let mut out = [0.0; L];
        for (i, o) in out.iter_mut().enumerate().take(n) {
            // SAFETY: i < n, and the caller's pointer is valid for n elements.
            let bits = u16::from_le(unsafe { p.cast::<u16>().add(i).read_unaligned() });
            *o = f32::from_bits(u32::from(bits) << 16);
        }
        out
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::F {
        // SAFETY: the caller's pointer is valid for LANES f16.
        let raw = unsafe { p.cast::<[u16; L]>().read_unaligned() };
        let mut out = [0.0; L];
        for i in 0..L {
            out[i] = half::f16::from_bits(u16::from_le(raw[i])).to_f32();
        }
        out
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> Self::F {
        // SAFETY: the caller's pointer is valid for LANES bytes.
        unsafe { p.cast::<[i8; L]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_f8(self, p: *const u8) -> Self::F {
        // SAFETY: the caller's pointer is valid for LANES bytes.
        let raw = unsafe { p.cast::<[u8; L]>().read_unaligned() };
        let mut out = [0.0; L];
        for i in 0..L {
            out[i] = f8_to_f32(raw[i]);
        }
        out
    }
    #[inline(always)]
    unsafe fn load_f8_first(self, p: *const u8, n: usize) -> Self::F {
        let mut out = [0.0; L];
        for (i, o) in out.iter_mut().enumerate().take(n) {
            // SAFETY: i < n, and the caller's pointer is valid for n bytes.
            *o = f8_to_f32(unsafe { *p.add(i) });
        }
        out
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(self, p: *const u8) -> [Self::F; 2] {
        // SAFETY: the caller's pointer is valid for 2 * LANES bf16.
        let raw = unsafe { p.cast::<[u16; 2 * L]>().read_unaligned() };
        let mut out = [[0.0; L]; 2];
        for i in 0..L {
            out[0][i] = f32::from_bits(u32::from(u16::from_le(raw[2 * i])) << 16);
            out[1][i] = f32::from_bits(u32::from(u16::from_le(raw[2 * i + 1])) << 16);
        }
        out
    }
}
