//! Top-k, top-p and min-p: tokens that they refuse become `-inf`.

use std::cmp::Ordering;

use super::super::{
    isa::{Host, Job},
    simd::{Simd, exp},
};

/// A row of logits after temperature, shifted so that the largest is 0.
pub(super) struct Filter<'a> {
    host: Host,
    row: &'a mut [f32],
}

/// A token with its logit. Sorted, the largest logit stands first, then the lowest id.
pub(super) type Ranked = (f32, u32);

pub(super) fn falling(a: &Ranked, b: &Ranked) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

impl<'a> Filter<'a> {
    pub(super) fn new(host: Host, row: &'a mut [f32]) -> Self {
        Filter { host, row }
    }

    /// Keeps the `k` largest; 0 keeps all.
    pub(super) fn top_k(&mut self, k: usize) {
        if k == 0 || k >= self.row.len() {
            return;
        }
        let mut values = self.row.to_vec();
        let (above, border, _) = values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        let border = *border;
        // Of those that tie with the border, the lowest ids fill what is left of k.
        let mut ties = k - above.iter().filter(|&&x| x > border).count();
        for x in self.row.iter_mut() {
            if *x == border && ties > 0 {
                ties -= 1;
            } else if *x <= border {
                *x = f32::NEG_INFINITY;
            }
        }
    }

    /// Keeps the smallest set of largest tokens whose share of the probability reaches `p`; 1 or more keeps all.
    pub(super) fn top_p(&mut self, p: f32) {
        if p >= 1.0 {
            return;
        }
        let weights = self.host.run(Exp(self.row));
        let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        let goal = f64::from(p) * total;
        let mut left: Vec<Ranked> =
            self.row.iter().zip(0..).filter(|(x, _)| **x > f32::NEG_INFINITY).map(|(&x, i)| (x, i)).collect();
        // Sorted piece by piece: the set is small as a rule.
        let (mut sorted, mut piece, mut mass) = (0, 64, 0.0);
        while sorted < left.len() {
            let rest = &mut left[sorted..];
            let n = piece.min(rest.len());
            if n < rest.len() {
                rest.select_nth_unstable_by(n - 1, falling);
            }
            rest[..n].sort_unstable_by(falling);
            for last in &rest[..n] {
                mass += f64::from(weights[last.1 as usize]);
                if mass >= goal {
                    let last = *last;
                    return self.drop_after(last);
                }
            }
            sorted += n;
            piece *= 4;
        }
    }

    /// Keeps tokens with at least `p` times the largest probability; 0 keeps all.
    pub(super) fn min_p(&mut self, p: f32) {
        if p <= 0.0 {
            return;
        }
        let weights = self.host.run(Exp(self.row));
        for (x, w) in self.row.iter_mut().zip(weights) {
            if w < p {
                *x = f32::NEG_INFINITY;
            }
        }
    }

    fn drop_after(&mut self, (border, id): Ranked) {
        for (x, i) in self.row.iter_mut().zip(0..) {
            if *x < border || (*x == border && i > id) {
                *x = f32::NEG_INFINITY;
            }
        }
    }
}

/// `e^x` of every element.
pub(super) struct Exp<'a>(pub(super) &'a [f32]);

impl Job for Exp<'_> {
    type Out = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let mut out = self.0.to_vec();
        let mut at = 0;
        while at < out.len() {
            let n = (out.len() - at).min(S::LANES);
            // SAFETY: n elements from `at` are in the vector.
            unsafe {
                let y = exp(s, s.load_first(out.as_ptr().add(at), n));
                s.store_first(out.as_mut_ptr().add(at), y, n);
            }
            at += n;
        }
        out
    }
}
