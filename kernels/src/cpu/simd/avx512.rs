//! Sixteen lanes of AVX-512.

use std::arch::x86_64::*;

use super::Simd;

/// The proof that this CPU has AVX-512 F, BW, DQ and VL, with AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The CPU has these features.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Avx512(())
    }
}

/// An intrinsic of this set.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: `self` exists, so the CPU has the instruction; a pointer is the caller's, valid for what this intrinsic touches.
        unsafe { $e }
    };
}

impl Avx512 {
    /// Sixteen rows of sixteen lanes become sixteen columns.
    #[inline(always)]
    pub(crate) fn transpose(self, mut r: [__m512; 16]) -> [__m512; 16] {
        // Four passes, each of which swaps off-diagonal halves of blocks: of 2, 4, 8 and 16 rows.
        op!({
            for i in (0..16).step_by(2) {
                let (a, b) = (r[i], r[i + 1]);
                (r[i], r[i + 1]) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            }
            let mut q = r;
            for i in (0..16).step_by(4) {
                for j in 0..2 {
                    let (a, b) = (_mm512_castps_pd(r[i + j]), _mm512_castps_pd(r[i + j + 2]));
                    q[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                    q[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                }
            }
            // Quarter l of q[4 i + j] now holds column 4 l + j of rows 4 i..4 i + 4.
            for j in 0..4 {
                let lo = _mm512_shuffle_f32x4::<0b10_00_10_00>(q[j], q[4 + j]);
                let hi = _mm512_shuffle_f32x4::<0b11_01_11_01>(q[j], q[4 + j]);
                let lo2 = _mm512_shuffle_f32x4::<0b10_00_10_00>(q[8 + j], q[12 + j]);
                let hi2 = _mm512_shuffle_f32x4::<0b11_01_11_01>(q[8 + j], q[12 + j]);
                r[j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(lo, lo2);
                r[8 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(lo, lo2);
                r[4 + j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(hi, hi2);
                r[12 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(hi, hi2);
            }
        });
        r
    }

    /// Rounds to 32 bf16, lower half first.
    ///
    /// # Safety
    /// The CPU has AVX-512-BF16.
    #[inline(always)]
    pub(crate) unsafe fn pack_bf16(self, [lo, hi]: [__m512; 2]) -> __m512 {
        op!(std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(hi, lo)))
    }
}

/// First `n` of sixteen lanes.
#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    ((1_u32 << n) - 1) as __mmask16
}

/// Sixteen F8E4M3 by way of f16, whose subnormals cost nothing: the same bits, but for a bias of 7 instead of 15.
///
/// # Safety
/// The CPU has AVX-512 F with AVX2.
#[inline(always)]
unsafe fn widen_f8(raw: __m128i) -> __m512 {
    op!({
        let raw = _mm256_cvtepu8_epi16(raw);
        let magnitude = _mm256_and_si256(raw, _mm256_set1_epi16(0x7f));
        let nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
        let nan = _mm256_and_si256(nan, _mm256_set1_epi16(0x7c00));
        let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(raw, _mm256_set1_epi16(0x80)));
        let half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16::<7>(magnitude), sign), nan);
        _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0))
    })
}

impl Simd for Avx512 {
    type F = __m512;
    const LANES: usize = 16;
    const QUERIES: usize = 6;

    #[inline(always)]
    fn splat(self, v: f32) -> __m512 {
        op!(_mm512_set1_ps(v))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(a))
    }
    #[inline(always)]
    fn scale2(self, a: __m512, n: __m512) -> __m512 {
        op!(_mm512_scalef_ps(a, n))
    }
    #[inline(always)]
    fn round_bf16(self, a: __m512) -> __m512 {
        op!({
            let bits = _mm512_castps_si512(a);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let cut = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), cut, _mm512_set1_ps(f32::NAN))
        })
    }
    #[inline(always)]
    fn keep_first(self, a: __m512, n: usize, fill: f32) -> __m512 {
        op!(_mm512_mask_blend_ps(mask(n), _mm512_set1_ps(fill), a))
    }
    #[inline(always)]
    fn drop_first(self, a: __m512, n: usize, fill: f32) -> __m512 {
        op!(_mm512_mask_blend_ps(mask(n), a, _mm512_set1_ps(fill)))
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        op!({
            // The tree of `sum4`: lanes i and i + 2 of each quarter, then i and i + 1, then quarters i and i + 2, then the two left.
            let v = _mm512_add_ps(a, _mm512_shuffle_ps::<0b01_00_11_10>(a, a));
            let v = _mm512_add_ps(v, _mm512_shuffle_ps::<0b10_11_00_01>(v, v));
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            _mm_cvtss_f32(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)))
        })
    }
    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        let v = op!({
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let lo = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let hi = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            let v = _mm512_add_ps(lo, hi);
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v))
        });
        let mut out = [0.0; 4];
        op!(_mm_storeu_ps(out.as_mut_ptr(), v));
        out
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        op!(_mm512_reduce_max_ps(a))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        op!(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> __m512 {
        op!(_mm512_maskz_loadu_ps(mask(n), p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        op!(_mm512_storeu_ps(p, v));
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, v: __m512, n: usize) {
        op!(_mm512_mask_storeu_ps(p, mask(n), v));
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m512 {
        op!({
            let raw = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(raw))
        })
    }
    #[inline(always)]
    unsafe fn load_bf16_first(self, p: *const u8, n: usize) -> __m512 {
        op!({
            let raw = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(raw))
        })
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m512 {
        op!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        op!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))))
    }
    #[inline(always)]
    unsafe fn load_f8(self, p: *const u8) -> __m512 {
        op!(widen_f8(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_f8_first(self, p: *const u8, n: usize) -> __m512 {
        op!(widen_f8(_mm_maskz_loadu_epi8(mask(n), p.cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(self, p: *const u8) -> [__m512; 2] {
        op!({
            let raw = _mm512_loadu_si512(p.cast());
            let odd = _mm512_and_si512(raw, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(raw)), _mm512_castsi512_ps(odd)]
        })
    }
}
