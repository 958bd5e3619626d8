//! Sampling: what is asked of a row of logits, and the arithmetic that every device shares.
//!
//! Order, as in the OpenAI and vLLM reference behaviour: log-probabilities are taken from the *raw* logits; then bias,
//! repetition, presence and frequency penalties; then forbidden tokens; then greedy choice (`temperature == 0`) or
//! temperature, top-k, top-p, min-p and the draw.
//!
//! The draw is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): `argmax_t(logit_t / temperature + g_t)` over the tokens that
//! survive the filters, where `g_t = -ln(-ln(u_t))` and `u_t` comes from Philox4x32-10 (Salmon et al. 2011) with the request's
//! seed as key and `(token id, position)` as counter. No state is carried, so a request's tokens do not
//! depend on who shares its batch, and the arithmetic needs no sort and no particular order of reduction.

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
    /// False when the row held a NaN or nothing but `-inf`: the model is broken for this row, and `token` means nothing.
    pub finite: bool,
}
