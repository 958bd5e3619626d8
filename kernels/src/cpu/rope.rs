//! Rotary position embedding of one head.

use super::{
    isa::{Host, Job},
    simd::Simd,
};
use crate::ops::Rotary;

/// A table of rotations and how it applies.
#[derive(Clone, Copy)]
pub(super) struct Rotation<'a> {
    table: &'a [f32],
    dim: usize,
    interleaved: bool,
}

impl<'a> Rotation<'a> {
    /// For heads of `head_dim` elements.
    pub(super) fn new(rotary: &Rotary<'a, Vec<f32>>, head_dim: usize) -> Self {
        let &Rotary { table, dim, interleaved } = rotary;
        assert!(dim.is_multiple_of(2) && dim <= head_dim, "{dim} of {head_dim} elements are rotated");
        Rotation { table, dim, interleaved }
    }

    /// Rotates the first elements of a head at `position`.
    pub(super) fn turn(self, host: Host, x: &mut [f32], position: u32) {
        let at = position as usize * self.dim;
        let (cos, sin) = self.table[at..at + self.dim].split_at(self.dim / 2);
        let x = &mut x[..self.dim];
        if self.interleaved {
            for ((pair, c), s) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
                let [a, b] = [pair[0], pair[1]];
                pair[0] = a * c - b * s;
                pair[1] = b * c + a * s;
            }
        } else {
            host.run(Halves { x, cos, sin });
        }
    }
}

/// Pairs of an element of the first half with its like of the second.
struct Halves<'a> {
    x: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Job for Halves<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let half = self.cos.len();
        let (lo, hi) = self.x.split_at_mut(half);
        let mut at = 0;
        while at < half {
            let n = (half - at).min(S::LANES);
            // SAFETY: elements `at..at + n` of the four slices of length `half`.
            unsafe {
                let (a, b) = (s.load_first(lo.as_ptr().add(at), n), s.load_first(hi.as_ptr().add(at), n));
                let (c, d) =
                    (s.load_first(self.cos.as_ptr().add(at), n), s.load_first(self.sin.as_ptr().add(at), n));
                s.store_first(lo.as_mut_ptr().add(at), s.sub(s.mul(a, c), s.mul(b, d)), n);
                s.store_first(hi.as_mut_ptr().add(at), s.fma(b, c, s.mul(a, d)), n);
            }
            at += n;
        }
    }
}
