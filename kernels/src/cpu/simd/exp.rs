//! The exponential function and its kin.

use super::Simd;

/// `e^x` within 1.3 units in the last place (results below 2^-126: within one denormal step); `e^-inf` is 0, NaN stays NaN, and
/// `exp(0)` is exactly 1.
///
/// Cody and Waite (1980): `x = n ln 2 + r`, `|r| <= ln 2 / 2`, with the polynomial of Cephes' `expf` (Moshier 1989).
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // Beyond these the result is 0 or infinite. The bound stands first so that a NaN in x passes through.
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    let (n, y) = reduced(s, x);
    s.scale2(s.add(y, s.splat(1.0)), n)
}

/// `n` and `e^r - 1`, where `x = n ln 2 + r`.
#[inline(always)]
fn reduced<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts: n * 0.693359375 is exact.
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    (n, s.fma(s.mul(r, r), p, r))
}

/// `tanh x` within 2 units in the last place or so; small arguments keep their digits, NaN stays NaN.
///
/// `tanh x = d / (d + 2)` with `d = e^2x - 1 = 2^n (e^r - 1) + (2^n - 1)`.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    // Beyond 10 the result rounds to 1.
    let x = s.min(s.splat(20.0), s.max(s.splat(-20.0), s.add(x, x)));
    let (n, y) = reduced(s, x);
    let power = s.scale2(s.splat(1.0), n);
    let d = s.fma(power, y, s.sub(power, s.splat(1.0)));
    s.div(d, s.add(d, s.splat(2.0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::{Host, Isa, Job};

    struct Each<'a>(&'a mut [f32], bool);

    impl Job for Each<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.0.chunks_mut(S::LANES) {
                // SAFETY: the chunk holds as many elements as it says.
                unsafe {
                    let x = s.load_first(chunk.as_ptr(), chunk.len());
                    let y = if self.1 { tanh(s, x) } else { exp(s, x) };
                    s.store_first(chunk.as_mut_ptr(), y, chunk.len());
                }
            }
        }
    }

    fn all(isa: Isa, xs: &[f32]) -> Vec<f32> {
        each(isa, xs, false)
    }

    fn each(isa: Isa, xs: &[f32], tanh: bool) -> Vec<f32> {
        let mut out = xs.to_vec();
        Host::new(isa).expect("available").run(Each(&mut out, tanh));
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

    #[test]
    fn tanh_is_within_its_bound() {
        let mut xs: Vec<f32> = (0..200_000).map(|i| (i as f32 - 100_000.0) / 8_000.0).collect();
        xs.extend((0..120).flat_map(|i| [1.0, -1.3].map(|m| m * 0.5_f32.powi(i))));
        for isa in Isa::available() {
            for (x, y) in xs.iter().zip(each(isa, &xs, true)) {
                let want = f64::from(*x).tanh();
                assert!((f64::from(y) - want).abs() <= 3e-7 * want.abs(), "{isa}: tanh({x}) = {y}, {want}");
            }
            let ends = each(isa, &[f32::INFINITY, f32::NEG_INFINITY, 1e30, f32::NAN], true);
            assert!(ends[..3] == [1.0, -1.0, 1.0] && ends[3].is_nan(), "{isa}: {ends:?}");
        }
    }
}
