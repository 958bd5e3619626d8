//! Who goes to which expert.

use super::{
    CpuBuffer,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::{Simd, exp},
};
use crate::{
    error::KernelError,
    ops::{ExpertGroups, ExpertScoring, Result, Routing},
};

/// Scores and comparisons of a task.
const CHUNK: usize = 2_048;

/// Which experts the tokens of a step go to. A *pair* is a token with one of its experts: pair `r * k + j`.
pub struct CpuRoutes {
    routing: Routing,
    /// `[tokens * k]` expert of each pair.
    chosen: Vec<u32>,
    /// `[tokens * k]` weight of each pair.
    weights: Vec<f32>,
    /// `[tokens * k]` the pairs in the order of their experts; for one expert, in that of tokens.
    order: Vec<u32>,
    /// `[tokens * k]` where a pair is in that order.
    place: Vec<u32>,
    /// `[X + 1]` where each expert's pairs begin in that order.
    first: Vec<u32>,
}

impl CpuRoutes {
    /// `Ops::routes`.
    pub(super) fn new(tokens: usize, routing: &Routing) -> Result<CpuRoutes> {
        let Routing { experts, top_k, groups, .. } = *routing;
        let ExpertGroups { count, top, .. } =
            groups.unwrap_or(ExpertGroups { count: 1, top: 1, by_top_two: false });
        let fits = count > 0 && experts.is_multiple_of(count) && top <= count;
        if !fits || top_k == 0 || top_k > top * (experts / count) {
            let detail = format!("{top_k} of {experts} experts, of {top} of {count} groups");
            return Err(KernelError::Unsupported { op: "routes", detail });
        }
        let pairs = tokens * top_k;
        Ok(CpuRoutes {
            routing: *routing,
            chosen: vec![0; pairs],
            weights: vec![0.0; pairs],
            order: vec![0; pairs],
            place: vec![0; pairs],
            first: vec![0; experts + 1],
        })
    }

    /// `Ops::moe_route`.
    pub(super) fn choose(
        &mut self,
        host: Host,
        pool: &Pool,
        logits: &CpuBuffer,
        bias: Option<&Vec<f32>>,
        (routing, rows): (&Routing, usize),
    ) {
        assert!(*routing == self.routing, "routes of another routing");
        let Routing { experts, top_k, .. } = *routing;
        assert!(bias.is_none_or(|b| b.len() == experts), "a bias for each expert");
        let logits = &logits.as_slice()[..rows * experts];
        let chosen = Shared::new(&mut self.chosen[..rows * top_k]);
        let weights = Shared::new(&mut self.weights[..rows * top_k]);
        let chunk = (CHUNK / experts).max(1);
        pool.for_each(rows.div_ceil(chunk), rows * experts * (2 + top_k), |task| {
            let mut row = Choice::new(routing, bias.map(Vec::as_slice));
            for r in task * chunk..rows.min((task + 1) * chunk) {
                // SAFETY: the pairs of row `r` are this task's own.
                let (chosen, weights) =
                    unsafe { (chosen.slice(r * top_k, top_k), weights.slice(r * top_k, top_k)) };
                row.choose(host, &logits[r * experts..][..experts], chosen, weights);
            }
        });
        self.sort(rows);
    }

    /// Puts the pairs of the first `rows` tokens in the order of their experts.
    fn sort(&mut self, rows: usize) {
        let chosen = &self.chosen[..rows * self.routing.top_k];
        self.first.fill(0);
        for &expert in chosen {
            self.first[expert as usize + 1] += 1;
        }
        for expert in 0..self.routing.experts {
            self.first[expert + 1] += self.first[expert];
        }
        let mut next = self.first.clone();
        for (pair, &expert) in chosen.iter().enumerate() {
            let place = &mut next[expert as usize];
            self.order[*place as usize] = pair as u32;
            self.place[pair] = *place;
            *place += 1;
        }
    }

    /// k.
    pub(super) fn top_k(&self) -> usize {
        self.routing.top_k
    }

    /// X.
    pub(super) fn experts(&self) -> usize {
        self.routing.experts
    }

    /// Pairs in all.
    pub(super) fn pairs(&self) -> usize {
        self.first[self.routing.experts] as usize
    }

    /// The pair at a place in the order of experts.
    pub(super) fn pair(&self, place: usize) -> usize {
        self.order[place] as usize
    }

    /// A pair's place in that order, and its weight.
    pub(super) fn of(&self, pair: usize) -> (usize, f32) {
        (self.place[pair] as usize, self.weights[pair])
    }

    /// Each expert that somebody goes to, with the first and the number of its pairs in their order.
    pub(super) fn used(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        self.first.windows(2).enumerate().filter_map(|(expert, ends)| {
            let [first, end] = [ends[0] as usize, ends[1] as usize];
            (end > first).then_some((expert, first, end - first))
        })
    }
}

/// The choice of one token's experts, with room to think.
struct Choice<'a> {
    routing: &'a Routing,
    bias: Option<&'a [f32]>,
    scores: Vec<f32>,
    /// Scores to choose by.
    keys: Vec<f32>,
    /// Experts that may still be chosen.
    free: Vec<bool>,
}

impl<'a> Choice<'a> {
    fn new(routing: &'a Routing, bias: Option<&'a [f32]>) -> Self {
        let x = routing.experts;
        Choice { routing, bias, scores: vec![0.0; x], keys: vec![0.0; x], free: vec![true; x] }
    }

    fn choose(&mut self, host: Host, logits: &[f32], chosen: &mut [u32], weights: &mut [f32]) {
        self.scores.copy_from_slice(logits);
        host.run(Scores { x: &mut self.scores, scoring: self.routing.scoring });
        self.keys.copy_from_slice(&self.scores);
        if let Some(bias) = self.bias {
            self.keys.iter_mut().zip(bias).for_each(|(key, bias)| *key += bias);
        }
        self.free.fill(true);
        if let Some(groups) = self.routing.groups {
            self.keep_best_groups(groups);
        }
        for (chosen, weight) in chosen.iter_mut().zip(&mut *weights) {
            let best = best(&self.keys, &self.free);
            self.free[best] = false;
            (*chosen, *weight) = (best as u32, self.scores[best]);
        }
        let total: f32 = if self.routing.renormalize { weights.iter().sum() } else { 1.0 };
        for weight in weights {
            *weight = *weight / total * self.routing.scale;
        }
    }

    /// Leaves only the experts of the best groups.
    fn keep_best_groups(&mut self, groups: ExpertGroups) {
        let size = self.keys.len() / groups.count;
        let of_group = |keys: &[f32]| {
            let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for &key in keys {
                (first, second) = if key > first { (key, first) } else { (first, second.max(key)) };
            }
            if groups.by_top_two && size > 1 { first + second } else { first }
        };
        let keys: Vec<f32> = self.keys.chunks(size).map(of_group).collect();
        let mut free = vec![true; groups.count];
        for _ in 0..groups.top {
            let best = best(&keys, &free);
            free[best] = false;
        }
        for (group, left_out) in free.into_iter().enumerate().filter(|(_, free)| *free) {
            self.free[group * size..][..size].fill(!left_out);
        }
    }
}

/// The largest key among the free ones, the first of equals; whichever, where there are NaNs.
fn best(keys: &[f32], free: &[bool]) -> usize {
    let candidates = (0..keys.len()).filter(|&i| free[i]);
    candidates.reduce(|best, i| if keys[i] > keys[best] { i } else { best }).unwrap_or(0)
}

/// Makes scores of logits, in place.
struct Scores<'a> {
    x: &'a mut [f32],
    scoring: ExpertScoring,
}

impl Job for Scores<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Scores { x, scoring } = self;
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = s.splat(0.0);
        for chunk in x.chunks_mut(S::LANES) {
            let n = chunk.len();
            // SAFETY: the chunk holds `n` elements.
            unsafe {
                let v = s.load_first(chunk.as_ptr(), n);
                let y = match scoring {
                    ExpertScoring::Softmax => exp(s, s.sub(v, s.splat(max))),
                    ExpertScoring::Sigmoid => {
                        let one = s.splat(1.0);
                        s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), v))))
                    }
                };
                sum = s.add(sum, s.keep_first(y, n, 0.0));
                s.store_first(chunk.as_mut_ptr(), y, n);
            }
        }
        if scoring == ExpertScoring::Softmax {
            let total = s.sum(sum);
            x.iter_mut().for_each(|x| *x /= total);
        }
    }
}
