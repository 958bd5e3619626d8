//! From logits to tokens and log-probabilities: see [`crate::sampling`] for what is computed.

mod filter;
mod logprobs;

use self::{filter::Filter, logprobs::logprobs};
use super::{
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::{Simd, exp},
};
use crate::{
    KernelError,
    sampling::{RowTask, SampleSpec, Sampled, gumbel, noise_bits},
};

/// A mask has a bit for each token, and no other length than that makes.
pub(super) fn check_masks(tasks: &[RowTask], vocab: usize) -> Result<(), KernelError> {
    let expected = vocab.div_ceil(32);
    for task in tasks {
        if let RowTask::Sample(SampleSpec { allowed: Some(mask), .. }, _) = task
            && mask.len() != expected
        {
            let (what, got, expected) = ("words of allowed tokens".into(), vec![mask.len()], vec![expected]);
            return Err(KernelError::Shape { op: "sample", what, got, expected });
        }
    }
    Ok(())
}

/// `Ops::sample`.
pub(super) fn run(
    host: Host,
    pool: &Pool,
    logits: &mut [f32],
    vocab: usize,
    tasks: &[RowTask],
) -> Vec<Sampled> {
    let mut results = vec![Sampled { token: 0, logprobs: None, finite: false }; tasks.len()];
    let (rows, out) = (Shared::new(logits), Shared::new(&mut results));
    pool.for_each(tasks.len(), tasks.len() * vocab * 3, |i| {
        // SAFETY: row `i` and result `i` are this task's own.
        let (row, out) = unsafe { (rows.slice(i * vocab, vocab), out.slice(i, 1)) };
        out[0] = one(host, row, &tasks[i]);
    });
    results
}

fn one(host: Host, row: &mut [f32], task: &RowTask) -> Sampled {
    let broken = |token| Sampled { token, logprobs: None, finite: false };
    let usable = !host.run(HasNan(row)) && host.run(Max(row)) > f32::NEG_INFINITY;
    match task {
        &RowTask::Score(token, _) if !usable => broken(token),
        &RowTask::Score(token, top) => {
            Sampled { token, logprobs: Some(logprobs(host, row, token, top)), finite: true }
        }
        RowTask::Sample(..) if !usable => broken(0),
        RowTask::Sample(spec, top) => {
            let raw = top.map(|_| row.to_vec());
            adjust(row, spec);
            let Some(token) = choose(host, row, spec) else { return broken(0) };
            let logprobs = raw.zip(*top).map(|(raw, top)| logprobs(host, &raw, token, top));
            Sampled { token, logprobs, finite: true }
        }
    }
}

/// Bias, penalties, forbidden tokens and those that are not allowed.
fn adjust(row: &mut [f32], spec: &SampleSpec) {
    for &(token, bias) in &spec.logit_bias {
        row[token as usize] += bias;
    }
    for &(token, count) in &spec.token_counts {
        let x = &mut row[token as usize];
        *x = if *x > 0.0 { *x / spec.repetition_penalty } else { *x * spec.repetition_penalty };
        if count > 0 {
            *x -= spec.presence_penalty + spec.frequency_penalty * count as f32;
        }
    }
    for &token in &spec.forbidden {
        row[token as usize] = f32::NEG_INFINITY;
    }
    if let Some(allowed) = &spec.allowed {
        for (row, word) in row.chunks_mut(32).zip(allowed.iter()) {
            if *word != u32::MAX {
                keep(row, *word);
            }
        }
    }
}

/// Keeps the logits whose bits are set.
fn keep(row: &mut [f32], bits: u32) {
    for (bit, x) in row.iter_mut().enumerate() {
        if bits >> bit & 1 == 0 {
            *x = f32::NEG_INFINITY;
        }
    }
}

/// The next token, or none when no token is left to choose from.
fn choose(host: Host, row: &mut [f32], spec: &SampleSpec) -> Option<u32> {
    let max = host.run(Max(row));
    if max == f32::NEG_INFINITY || max.is_nan() {
        return None;
    }
    if spec.temperature == 0.0 {
        return row.iter().position(|&x| x == max).map(|i| i as u32);
    }
    // Infinite logits share all the probability.
    let infinite = max == f32::INFINITY;
    for x in row.iter_mut() {
        // The sum makes -0 a +0, so that the two are a tie.
        let y = (*x - max) / spec.temperature + 0.0;
        *x = if !infinite {
            y
        } else if *x == max {
            0.0
        } else {
            f32::NEG_INFINITY
        };
    }
    let mut filter = Filter::new(host, row);
    filter.top_k(spec.top_k as usize);
    filter.top_p(spec.top_p);
    filter.min_p(spec.min_p);
    Some(host.run(Draw { row, seed: spec.seed, position: spec.position }))
}

/// Gumbel-max over a row whose largest logit is 0.
struct Draw<'a> {
    row: &'a [f32],
    seed: u64,
    position: u32,
}

/// Tokens whose noise is made at a time.
const CHUNK: usize = 64;

impl Job for Draw<'_> {
    type Out = u32;

    /// Noise needs two logarithms, and almost no token can win. As `-ln u >= 1 - u`, token `t` beats the best sum so far only if
    /// `1 - u < e^(logit - best)`, which costs an exponential for a vector of tokens; the rest are decided exactly, in f64.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> u32 {
        let Draw { row, seed, position } = self;
        let first = row.iter().position(|&x| x == 0.0).unwrap_or(0) as u32;
        let sum = |t: u32| f64::from(row[t as usize]) + gumbel(noise_bits(seed, position, t));
        let (mut best, mut token) = (sum(first), first);
        for (c, chunk) in row.chunks(CHUNK).enumerate() {
            // Larger by more than all roundings; the largest possible value of `u` decides about the whole chunk.
            let margin = 1.001 * (-best).exp() as f32;
            let chance = chances(s, chunk, margin);
            if chance.iter().all(|&p| p < 1.0 / (1_u32 << 25) as f32) {
                continue;
            }
            let base = (c * CHUNK) as u32;
            let mut rest = [0.0_f32; CHUNK];
            for (i, rest) in rest.iter_mut().enumerate() {
                let bits = noise_bits(seed, position, base + i as u32);
                *rest = ((1 << 24) - bits) as f32;
            }
            for i in 0..chunk.len() {
                // `rest` is `2^24 (1 - u) + 1/2`.
                if rest[i] - 0.5 <= chance[i] * (1_u32 << 24) as f32 {
                    let (t, y) = (base + i as u32, sum(base + i as u32));
                    if y > best || (y == best && t < token) {
                        (best, token) = (y, t);
                    }
                }
            }
        }
        token
    }
}

/// `e^x * factor` of up to [`CHUNK`] logits; 0 beyond them.
#[inline(always)]
fn chances<S: Simd>(s: S, chunk: &[f32], factor: f32) -> [f32; CHUNK] {
    let mut out = [f32::NEG_INFINITY; CHUNK];
    out[..chunk.len()].copy_from_slice(chunk);
    let mut at = 0;
    while at < CHUNK {
        // SAFETY: LANES divides the length of the array.
        unsafe {
            let y = exp(s, s.load(out.as_ptr().add(at)));
            s.store(out.as_mut_ptr().add(at), s.mul(y, s.splat(factor)));
        }
        at += S::LANES;
    }
    out
}

/// Largest element; meaningless when there is a NaN.
struct Max<'a>(&'a [f32]);

impl Job for Max<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut best = [s.splat(f32::NEG_INFINITY); 4];
        let mut chunks = self.0.chunks_exact(4 * S::LANES);
        for chunk in &mut chunks {
            for (i, best) in best.iter_mut().enumerate() {
                // SAFETY: the chunk holds four vectors.
                *best = s.max(*best, unsafe { s.load(chunk.as_ptr().add(i * S::LANES)) });
            }
        }
        let best = s.max_lane(s.max(s.max(best[0], best[1]), s.max(best[2], best[3])));
        chunks.remainder().iter().fold(best, |m, &x| m.max(x))
    }
}

struct HasNan<'a>(&'a [f32]);

impl Job for HasNan<'_> {
    type Out = bool;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> bool {
        self.0.chunks(256).any(|chunk| {
            let mut nan = false;
            for x in chunk {
                nan |= x.is_nan();
            }
            nan
        })
    }
}
