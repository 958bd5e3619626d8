//! Log-probabilities of raw logits.

use super::{
    super::{
        isa::{Host, Job},
        simd::{Simd, exp},
    },
    Max,
    filter::{Ranked, falling},
};
use crate::sampling::Logprobs;

/// Log-probability and rank of `token`, and the `top` largest, of a row without NaN that is not all `-inf`.
pub(super) fn logprobs(host: Host, row: &[f32], token: u32, top: u32) -> Logprobs {
    let max = host.run(Max(row));
    let log_sum = if max == f32::INFINITY {
        // Infinite logits share all the probability; the others have none.
        (row.iter().filter(|&&x| x == max).count() as f64).ln()
    } else {
        host.run(SumExp { row, max }).ln()
    };
    let logprob = |x: f32| {
        if x == max { -log_sum as f32 } else { (f64::from(x) - f64::from(max) - log_sum) as f32 }
    };
    let chosen = row[token as usize];
    let above = row.iter().filter(|&&x| x > chosen).count()
        + row[..token as usize].iter().filter(|&&x| x == chosen).count();
    Logprobs {
        logprob: logprob(chosen),
        rank: above as u32 + 1,
        top: largest(row, top as usize).into_iter().map(|(x, id)| (id, logprob(x))).collect(),
    }
}

/// The `n` largest with their ids, largest first, lowest id first among equals.
fn largest(row: &[f32], n: usize) -> Vec<Ranked> {
    let n = n.min(row.len());
    if n == 0 {
        return Vec::new();
    }
    let mut all: Vec<Ranked> = row.iter().zip(0..).map(|(&x, i)| (x + 0.0, i)).collect();
    all.select_nth_unstable_by(n - 1, falling);
    all.truncate(n);
    all.sort_unstable_by(falling);
    all
}

/// `Σ e^(x - max)`: 64 terms at a time in f32, their sums in f64.
struct SumExp<'a> {
    row: &'a [f32],
    max: f32,
}

impl Job for SumExp<'_> {
    type Out = f64;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let max = s.splat(self.max);
        let mut total = 0.0;
        for chunk in self.row.chunks(64) {
            let mut sum = s.splat(0.0);
            let mut at = 0;
            while at < chunk.len() {
                let n = (chunk.len() - at).min(S::LANES);
                // SAFETY: n elements from `at` are in the chunk.
                let x = unsafe { s.load_first(chunk.as_ptr().add(at), n) };
                sum = s.add(sum, exp(s, s.sub(s.keep_first(x, n, f32::NEG_INFINITY), max)));
                at += n;
            }
            total += f64::from(s.sum(sum));
        }
        total
    }
}
