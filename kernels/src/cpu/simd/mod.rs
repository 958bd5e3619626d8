//! Vectors of f32, one width per instruction set, and the functions written over them.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod exp;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use exp::{exp, tanh};
pub(crate) use portable::Portable;

/// Vectors of `LANES` f32. A value of an implementing type proves that the CPU has the instructions, so that arithmetic is safe.
///
/// Every operation is one IEEE operation per lane (`fma` may round once or twice, by implementation), so that a lane's bits
/// do not depend on its neighbours. The `*_first` forms touch only the first `n <= LANES` elements of memory, and read the others as 0.
///
/// # Safety
/// of the loads and stores: the pointer must be valid for the elements that are touched; it needs no alignment.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    type F: Copy;
    const LANES: usize;
    /// Queries that attention keeps in registers at a time.
    const QUERIES: usize;

    fn splat(self, v: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `b` where a lane is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `b` where a lane is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// `a * 2^n` for integral `n` in -160..=160.
    fn scale2(self, a: Self::F, n: Self::F) -> Self::F;
    /// Rounds to bf16 (nearest even) and widens again; a NaN stays NaN.
    fn round_bf16(self, a: Self::F) -> Self::F;
    /// Lanes `0..n` of `a`, then `fill`.
    fn keep_first(self, a: Self::F, n: usize, fill: f32) -> Self::F;
    /// `fill` in lanes `0..n`, then those of `a`.
    fn drop_first(self, a: Self::F, n: usize, fill: f32) -> Self::F;
    /// Sum of the lanes, in one fixed tree.
    fn sum(self, a: Self::F) -> f32;
    /// Four sums, each with the bits that [`Simd::sum`] gives.
    fn sum4(self, a: [Self::F; 4]) -> [f32; 4];
    /// Largest lane; NaNs may be skipped.
    fn max_lane(self, a: Self::F) -> f32;

    unsafe fn load(self, p: *const f32) -> Self::F;
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::F;
    unsafe fn store(self, p: *mut f32, v: Self::F);
    unsafe fn store_first(self, p: *mut f32, v: Self::F, n: usize);
    /// Widens `LANES` bf16.
    unsafe fn load_bf16(self, p: *const u8) -> Self::F;
    unsafe fn load_bf16_first(self, p: *const u8, n: usize) -> Self::F;
    /// Widens `LANES` f16.
    unsafe fn load_f16(self, p: *const u8) -> Self::F;
    /// Widens `LANES` signed bytes.
    unsafe fn load_i8(self, p: *const i8) -> Self::F;
    /// Widens `LANES` F8E4M3.
    unsafe fn load_f8(self, p: *const u8) -> Self::F;
    unsafe fn load_f8_first(self, p: *const u8, n: usize) -> Self::F;
    /// Widens `2 * LANES` bf16 into those of even and those of odd index.
    unsafe fn load_bf16_pair(self, p: *const u8) -> [Self::F; 2];
}

/// Asks for the line at `p`, which may be any address, to come into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
