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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::{Host, Isa, Job};

    struct Each<'a>(&'a mut [f32]);

    impl Job for Each<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.0.chunks_mut(S::LANES) {
                // SAFETY: the chunk holds as many elements as it says.
                unsafe {
                    let x = s.load_first(chunk.as_ptr(), chunk.len());
                    s.store_first(chunk.as_mut_ptr(), exp(s, x), chunk.len());
                }
            }
        }
    }

    fn all(isa: Isa, xs: &[f32]) -> Vec<f32> {
        let mut out = xs.to_vec();
        Host::new(isa).expect("available").run(Each(&mut out));
        out
    }

    #[test]
    fn is_within_its_bound() {
        let xs: Vec<f32> = (0..400_000).map(|i| -87.3 + i as f32 * (88.7 + 87.3) / 400_000.0).collect();
        for isa in Isa::available() {
            for (x, y) in xs.iter().zip(all(isa, &xs)) {
                let want = f64::from(*x).exp();
                let ulp = f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
                assert!((f64::from(y) - want).abs() <= 1.3 * ulp, "{isa}: exp({x}) = {y}, {want}");
            }
        }
    }

    #[test]
    fn keeps_its_head_at_the_ends() {
        let xs = [0.0, -0.0, f32::NEG_INFINITY, -104.0, -1e30, 88.8, f32::INFINITY, -100.0, f32::NAN];
        for isa in Isa::available() {
            let y = all(isa, &xs);
            assert_eq!(y[..7], [1.0, 1.0, 0.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY], "{isa}");
            assert!((f64::from(y[7]) - (-100.0_f64).exp()).abs() <= 1.5e-45, "{isa}: {}", y[7]);
            assert!(y[8].is_nan(), "{isa}");
        }
    }
}
