//! The exponential function.

use super::Simd;

/// `e^x` within 1.3 units in the last place (results below 2^-126: within one denormal step); `e^-inf` is 0, NaN stays NaN, and
/// `exp(0)` is exactly 1.
///
/// Cody and Waite (1980): `x = n ln 2 + r`, `|r| <= ln 2 / 2`, with the polynomial of Cephes' `expf` (Moshier 1989).
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // Beyond these the result is 0 or infinite. The bound stands first so that a NaN in x passes through.
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts: n * 0.693359375 is exact.
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let y = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    s.scale2(y, n)
}
