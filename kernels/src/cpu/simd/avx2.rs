//! Eight lanes of AVX2 with FMA and F16C.

use std::arch::x86_64::*;

use super::Simd;

/// The proof that this CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The CPU has AVX2, FMA and F16C.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Avx2(())
    }
}

/// An intrinsic of this set.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: `self` exists, so the CPU has the instruction; a pointer is the caller's, valid for what this intrinsic touches.
        unsafe { $e }
    };
}

/// First `n` of eight lanes, as a mask for `maskload`.
#[inline(always)]
fn mask(n: usize) -> [i32; 8] {
    const TABLE: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut m = [0; 8];
    m.copy_from_slice(&TABLE[8 - n..16 - n]);
    m
}

impl Avx2 {
    #[inline(always)]
    fn mask(self, n: usize) -> __m256i {
        let m = mask(n);
        op!(_mm256_loadu_si256(m.as_ptr().cast()))
    }
}

impl Simd for Avx2 {
    type F = __m256;
    const LANES: usize = 8;
    const QUERIES: usize = 2;

    #[inline(always)]
    fn splat(self, v: f32) -> __m256 {
        op!(_mm256_set1_ps(v))
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        op!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        op!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn scale2(self, a: __m256, n: __m256) -> __m256 {
        op!({
            let bias = _mm256_set1_epi32(127);
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let p = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let q = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(p)), _mm256_castsi256_ps(q))
        })
    }
    #[inline(always)]
    fn round_bf16(self, a: __m256) -> __m256 {
        op!({
            let bits = _mm256_castps_si256(a);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let cut = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(0xffff_0000_u32 as i32)));
            _mm256_blendv_ps(cut, _mm256_set1_ps(f32::NAN), _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a))
        })
    }
    #[inline(always)]
    fn keep_first(self, a: __m256, n: usize, fill: f32) -> __m256 {
        op!(_mm256_blendv_ps(_mm256_set1_ps(fill), a, _mm256_castsi256_ps(self.mask(n))))
    }
    #[inline(always)]
    fn drop_first(self, a: __m256, n: usize, fill: f32) -> __m256 {
        op!(_mm256_blendv_ps(a, _mm256_set1_ps(fill), _mm256_castsi256_ps(self.mask(n))))
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        let z = self.splat(0.0);
        self.sum4([a, z, z, z])[0]
    }
    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        let v = op!({
            let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
            let lo = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
            let hi = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
            let v = _mm256_add_ps(lo, hi);
            _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v))
        });
        let mut out = [0.0; 4];
        op!(_mm_storeu_ps(out.as_mut_ptr(), v));
        out
    }
    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        op!({
            let v = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        })
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        op!(_mm256_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> __m256 {
        op!(_mm256_maskload_ps(p, self.mask(n)))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        op!(_mm256_storeu_ps(p, v));
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, v: __m256, n: usize) {
        op!(_mm256_maskstore_ps(p, self.mask(n), v));
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m256 {
        op!({
            let raw = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(raw))
        })
    }
    #[inline(always)]
    unsafe fn load_bf16_first(self, p: *const u8, n: usize) -> __m256 {
        let mut raw = [0_u8; 16];
        op!(std::ptr::copy_nonoverlapping(p, raw.as_mut_ptr(), 2 * n));
        op!(self.load_bf16(raw.as_ptr()))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m256 {
        op!(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        op!(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))))
    }
    #[inline(always)]
    unsafe fn load_f8(self, p: *const u8) -> __m256 {
        // By way of f16, whose subnormals cost nothing: the same bits, but for a bias of 7 instead of 15.
        op!({
            let raw = _mm_cvtepu8_epi16(_mm_loadl_epi64(p.cast()));
            let magnitude = _mm_and_si128(raw, _mm_set1_epi16(0x7f));
            let nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
            let nan = _mm_and_si128(nan, _mm_set1_epi16(0x7c00));
            let sign = _mm_slli_epi16::<8>(_mm_and_si128(raw, _mm_set1_epi16(0x80)));
            let half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16::<7>(magnitude), sign), nan);
            _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0))
        })
    }
    #[inline(always)]
    unsafe fn load_f8_first(self, p: *const u8, n: usize) -> __m256 {
        let mut raw = [0_u8; 8];
        op!(std::ptr::copy_nonoverlapping(p, raw.as_mut_ptr(), n));
        op!(self.load_f8(raw.as_ptr()))
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(self, p: *const u8) -> [__m256; 2] {
        op!({
            let raw = _mm256_loadu_si256(p.cast());
            let odd = _mm256_and_si256(raw, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(raw)), _mm256_castsi256_ps(odd)]
        })
    }
}
