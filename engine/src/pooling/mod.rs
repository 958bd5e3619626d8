//! From hidden states to an embedding: which of a prompt's states count, how they are put together, and what follows ([`Head`]).

mod head;

use std::ops::Range;

pub use self::head::{Head, HeadFunction, HeadLayer, Linear, Scorer};

use crate::planted::{Bug, planted};

/// Which hidden states, after the final norm, make a prompt's embedding, and how: of one it is the state itself.
///
/// The names are those of sentence-transformers (Reimers and Gurevych 2019, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pooling {
    /// The last token's: the only one in a decoder that has seen the whole prompt.
    Last,
    /// All tokens'.
    Mean,
    /// The first token's.
    Cls,
    /// The largest of all tokens', value by value.
    Max,
    /// The mean of all tokens', the one at position `p` counted `p + 1` times (Muennighoff 2022, SGPT, section 3.1.1).
    WeightedMean,
    /// The sum of all tokens' over the square root of their number.
    MeanSqrtLen,
}

impl Pooling {
    /// Its name in options, on the wire and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Last => "last",
            Self::Mean => "mean",
            Self::Cls => "cls",
            Self::Max => "max",
            Self::WeightedMean => "weightedmean",
            Self::MeanSqrtLen => "mean_sqrt_len_tokens",
        }
    }

    /// The positions of a prompt of `len` tokens whose states count.
    pub fn wanted(self, len: usize) -> Range<usize> {
        match self {
            Self::Last => len - 1..len,
            Self::Mean | Self::Max | Self::WeightedMean | Self::MeanSqrtLen => 0..len,
            Self::Cls => 0..1,
        }
    }
}

/// The states of one prompt so far.
///
/// They are added in the order of positions, in f64, whatever the chunks in which they come. So the sum's bits depend on the states alone.
#[derive(Debug, Clone)]
pub(crate) struct Pooler {
    pooling: Pooling,
    wanted: Range<usize>,
    /// Those before it were added.
    next: usize,
    /// `[H]`; empty before the first state.
    sum: Vec<f64>,
}

impl Pooler {
    /// For a prompt of `len` tokens, at least one.
    pub(crate) fn new(pooling: Pooling, len: usize) -> Self {
        let wanted = pooling.wanted(len);
        Self { pooling, next: wanted.start, wanted, sum: Vec::new() }
    }

    /// Of the positions of a row, those whose states are to be taken in. A recomputation does not repeat them.
    pub(crate) fn needed(&self, row: Range<usize>) -> Range<usize> {
        let first = if planted(Bug::StatesTwice) { self.wanted.start } else { self.next };
        let (start, end) = (row.start.max(first), row.end.min(self.wanted.end));
        start..end.max(start)
    }

    /// Tokens of the beginning whose states are not needed any more, or never were: they may come from the prefix cache.
    pub(crate) fn reusable(&self) -> usize {
        if self.is_complete() { usize::MAX } else { self.next }
    }

    /// Adds `states`, `[positions.len(), H]`. False when these are not so many, or not those that come next.
    #[must_use]
    pub(crate) fn add(&mut self, positions: Range<usize>, states: &[f32]) -> bool {
        let count = positions.len();
        if count == 0 {
            return states.is_empty();
        }
        let width = states.len() / count;
        if self.sum.is_empty() {
            let nothing = if self.pooling == Pooling::Max { f64::NEG_INFINITY } else { 0.0 };
            self.sum = vec![nothing; width];
        }
        let is_next = positions.start == self.next || planted(Bug::StatesTwice);
        if !is_next || width == 0 || states.len() != count * self.sum.len() {
            return false;
        }
        for (position, state) in positions.clone().zip(states.chunks_exact(width)) {
            let weight = if self.pooling == Pooling::WeightedMean { (position + 1) as f64 } else { 1.0 };
            let is_max = self.pooling == Pooling::Max;
            let take = |sum: &mut f64, x: f64| *sum = if is_max { sum.max(x) } else { *sum + weight * x };
            self.sum.iter_mut().zip(state).for_each(|(sum, &x)| take(sum, f64::from(x)));
        }
        self.next = positions.end;
        true
    }

    /// Whether every state that counts was added.
    pub(crate) fn is_complete(&self) -> bool {
        self.next >= self.wanted.end
    }

    /// `[H]` what the states come to.
    pub(crate) fn pooled(&self) -> Vec<f32> {
        let len = self.wanted.len() as f64;
        let count = match self.pooling {
            Pooling::Last | Pooling::Mean | Pooling::Cls => len,
            Pooling::Max => 1.0,
            Pooling::WeightedMean => len * (len + 1.0) / 2.0,
            Pooling::MeanSqrtLen => len.sqrt(),
        };
        self.sum.iter().map(|&sum| (sum / count) as f32).collect()
    }
}

/// What a vector is divided by when its length is smaller, as in PyTorch's `normalize`.
const LEAST_LENGTH: f64 = 1e-12;

/// Divides a vector by its Euclidean length, which is computed in f64.
pub(crate) fn normalize(values: &mut [f32]) {
    let length = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt().max(LEAST_LENGTH);
    values.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// States whose sum depends on the order of addition, in f32 and in f64.
    fn states(count: usize) -> Vec<f32> {
        let value =
            |i: usize| if i.is_multiple_of(3) { 3e16 / (i + 1) as f32 } else { 1.0 / (i as f32 + 0.3) };
        (0..2 * count).map(value).collect()
    }

    fn pooled(pooling: Pooling, cuts: &[usize]) -> Vec<u32> {
        let len = cuts.iter().sum();
        let all = states(len);
        let mut pooler = Pooler::new(pooling, len);
        let mut start = 0;
        for cut in cuts {
            let needed = pooler.needed(start..start + cut);
            assert!(pooler.add(needed.clone(), &all[2 * needed.start..2 * needed.end]));
            start += cut;
        }
        assert!(pooler.is_complete());
        pooler.pooled().iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn chunks_do_not_change_the_bits() {
        let all = states(12);
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for pooling in
            [Pooling::Last, Pooling::Mean, Pooling::Cls, Pooling::WeightedMean, Pooling::MeanSqrtLen]
        {
            let whole = pooled(pooling, &[12]);
            for cuts in [&[1; 12][..], &[5, 7], &[11, 1], &[1, 11], &[3, 3, 3, 3]] {
                assert_eq!(pooled(pooling, cuts), whole, "{pooling:?} in chunks of {cuts:?}");
            }
        }
        assert_eq!(pooled(Pooling::Last, &[12]), bits(&all[22..]));
        assert_eq!(pooled(Pooling::Cls, &[12]), bits(&all[..2]));
        let mean = (0..12).fold(0.0, |sum, at| sum + f64::from(all[2 * at])) / 12.0;
        assert_eq!(pooled(Pooling::Mean, &[12])[0], (mean as f32).to_bits());
    }

    #[test]
    fn states_of_all_tokens_are_put_together_in_four_ways() {
        let states = [1.0, -2.0, 4.0, -6.0, 0.5, -1.0];
        for (pooling, expected) in [
            (Pooling::Mean, [5.5 / 3.0, -3.0]),
            (Pooling::Max, [4.0, -1.0]),
            (Pooling::WeightedMean, [(1.0 + 8.0 + 1.5) / 6.0, (-2.0 - 12.0 - 3.0) / 6.0]),
            (Pooling::MeanSqrtLen, [5.5 / 3.0_f64.sqrt(), -9.0 / 3.0_f64.sqrt()]),
        ] {
            let mut pooler = Pooler::new(pooling, 3);
            assert!(pooler.add(0..2, &states[..4]) && pooler.add(2..3, &states[4..]));
            assert_eq!(pooler.pooled(), expected.map(|x| x as f32), "{pooling:?}");
        }
    }

    #[test]
    fn what_was_added_is_not_needed_again_and_what_is_not_next_is_refused() {
        let mut pooler = Pooler::new(Pooling::Mean, 5);
        assert_eq!((pooler.reusable(), pooler.needed(0..3)), (0, 0..3));
        assert!(!pooler.add(1..3, &[1.0; 4]), "position 0 would be left out");
        assert!(!pooler.add(0..3, &[]), "no states");
        assert!(pooler.add(0..3, &[1.0; 6]));
        assert!(!pooler.add(3..5, &[1.0; 6]), "another width");
        assert_eq!((pooler.reusable(), pooler.needed(0..4), pooler.needed(0..2).len()), (3, 3..4, 0));
        assert!(pooler.add(3..5, &[1.0; 4]) && pooler.is_complete());
        assert_eq!(pooler.reusable(), usize::MAX);
        let last = Pooler::new(Pooling::Last, 5);
        assert_eq!((last.reusable(), last.needed(0..4).len(), last.needed(3..5)), (4, 0, 4..5));
    }

    #[test]
    fn a_normalised_vector_has_length_one_and_nothing_stays_nothing() {
        let mut values = [3.0, -4.0];
        normalize(&mut values);
        assert_eq!(values, [0.6, -0.8]);
        let mut nothing = [0.0; 3];
        normalize(&mut nothing);
        assert_eq!(nothing, [0.0; 3]);
    }
}
