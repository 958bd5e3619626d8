//! Sampling: what is asked of a row of logits, and the arithmetic that every device shares.
//!
//! Order, as in the OpenAI and vLLM reference behaviour: log-probabilities are taken from the *raw* logits; then bias,
//! repetition, presence and frequency penalties; then forbidden tokens and those that are not allowed; then greedy choice (`temperature == 0`) or
//! temperature, top-k, top-p, min-p and the draw.
//!
//! The draw is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): `argmax_t(logit_t / temperature + g_t)` over the tokens that
//! survive the filters, where `g_t = -ln(-ln(u_t))` and `u_t` comes from Philox4x32-10 (Salmon et al. 2011) with the request's
//! seed as key and `(token id, position)` as counter. No state is carried, so a request's tokens do not
//! depend on who shares its batch, and the arithmetic needs no sort and no particular order of reduction.

use std::sync::Arc;

/// How a row's next token is chosen. Values were validated by the caller.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleSpec {
    /// 0 is greedy (ties go to the lowest id).
    pub temperature: f32,
    /// Keep the `top_k` largest logits (ties at the border go to the lowest ids); 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of largest tokens whose probability reaches `top_p` (after top-k and temperature); 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least `min_p` times the largest probability; 0 keeps all.
    pub min_p: f32,
    /// Key of the random stream.
    pub seed: u64,
    /// Index of the token to be drawn in its sequence: the counter of the random stream.
    pub position: u32,
    /// CTRL-style (Keskar et al. 2019): a token of prompt or output has a positive logit divided, a negative multiplied; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from each token of the output.
    pub presence_penalty: f32,
    /// Subtracted for each time a token stands in the output.
    pub frequency_penalty: f32,
    /// Tokens that the penalties concern, with their number of occurrences in the output (0: in the prompt only).
    pub token_counts: Vec<(u32, u32)>,
    /// Added to the logits of these tokens; each id once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens that must not be chosen (end-of-sequence before `min_tokens`).
    pub forbidden: Vec<u32>,
    /// The tokens that may be chosen at all (a grammar's): `ceil(V / 32)` words of one bit per token, the lowest token in the lowest bit. None: all.
    pub allowed: Option<Arc<[u32]>>,
}

impl SampleSpec {
    /// The most likely token, without penalties.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            position: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            token_counts: Vec::new(),
            logit_bias: Vec::new(),
            forbidden: Vec::new(),
            allowed: None,
        }
    }
}

/// What to do with one row of logits.
#[derive(Debug, Clone, PartialEq)]
pub enum RowTask {
    /// Choose the next token; report log-probabilities of it and of the `n` largest when asked.
    Sample(SampleSpec, Option<u32>),
    /// Report the log-probability of a given token and of the `n` largest: prompt log-probabilities.
    Score(u32, u32),
}

/// Log-probabilities of one position: natural logarithm of the softmax of the raw logits.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Logprobs {
    /// Of the token chosen or given.
    pub logprob: f32,
    /// Its rank among all tokens, 1 for the largest.
    pub rank: u32,
    /// The largest, in falling order (ties: lowest id first).
    pub top: Vec<(u32, f32)>,
}

/// What a [`RowTask`] gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token chosen, or the one given to [`RowTask::Score`].
    pub token: u32,
    /// Present when they were asked for.
    pub logprobs: Option<Logprobs>,
    /// False when the row held a NaN, or nothing but `-inf` among the tokens that may be chosen: `token` means nothing then.
    pub finite: bool,
}

/// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3).
#[inline(always)]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c, mut k] = [counter, [key[0], key[1], 0, 0]];
    for _ in 0..10 {
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k[0] = k[0].wrapping_add(0x9E37_79B9);
        k[1] = k[1].wrapping_add(0xBB67_AE85);
    }
    c
}

/// The 24 random bits that decide about `token` at `position`: the upper bits of the first Philox word, with the seed as key (low
/// half first) and `[token, position, 0, 0]` as counter.
#[inline(always)]
pub fn noise_bits(seed: u64, position: u32, token: u32) -> u32 {
    philox4x32_10([token, position, 0, 0], [seed as u32, (seed >> 32) as u32])[0] >> 8
}

/// Gumbel noise `-ln(-ln(u))` of 24 bits, with `u = (bits + 1/2) / 2^24`, which is never 0 nor 1.
///
/// It lies between -2.86 and 17.33, in steps of at most 1.1. Callers must add it in f64: `u` next to 1 has no f32.
pub fn gumbel(bits: u32) -> f64 {
    let u = (f64::from(bits) + 0.5) / f64::from(1_u32 << 24);
    -(-u.ln()).ln()
}
