//! How tokens are chosen: as the client asked ([`SamplingParams`]) and as the engine does it ([`Sampling`]).

use crate::ids::TokenId;

/// Sampling as the client gave it: `None` takes the model's `generation_config.json`, then the neutral value.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// In [0, 1].
    pub min_p: Option<f32>,
    /// Over 0.
    pub repetition_penalty: Option<f32>,
    /// In [-2, 2].
    pub presence_penalty: Option<f32>,
    /// In [-2, 2].
    pub frequency_penalty: Option<f32>,
    /// Added to single tokens' logits, each in [-100, 100].
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the random stream; drawn at random when absent.
    pub seed: Option<u64>,
    /// Tokens to generate at most.
    pub max_tokens: Option<u32>,
    /// Tokens before which nothing but `max_tokens` ends the generation.
    pub min_tokens: Option<u32>,
    /// Strings that end the generation.
    pub stop: Vec<String>,
    /// Tokens that end the generation.
    pub stop_token_ids: Vec<TokenId>,
    /// Goes on past end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Report log-probabilities of the tokens and of so many of the largest.
    pub logprobs: Option<u32>,
    /// The same for the prompt.
    pub prompt_logprobs: Option<u32>,
    /// Independent completions.
    pub n: Option<u32>,
}

/// Sampling with every default filled in and every value checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// Each token once.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the random stream of completion 0.
    pub seed: u64,
    /// At least 1; prompt and completion fit the context together.
    pub max_tokens: usize,
    /// At most `max_tokens`.
    pub min_tokens: usize,
    /// Tokens that end a completion because the client said so.
    pub stop_token_ids: Vec<TokenId>,
    /// Tokens that end a completion because the model says so; empty with `ignore_eos`.
    pub eos_token_ids: Vec<TokenId>,
    /// Log-probabilities of generated tokens.
    pub logprobs: Option<u32>,
    /// Log-probabilities of prompt tokens.
    pub prompt_logprobs: Option<u32>,
}

impl Sampling {
    /// Key of the random stream of completion `index`: completion 0 has the client's own seed.
    pub fn seed_of(&self, index: u32) -> u64 {
        // The odd constant is 2^64 / golden ratio (Knuth, TAOCP 3, 6.4): distinct keys for distinct indices.
        self.seed.wrapping_add(u64::from(index).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// What stands in its place for a sequence that chooses no token. `max_tokens` is 1, so that it needs a block for each token of its
    /// prompt: of a generation, the last token is never written.
    pub fn of_embedding() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens: 1,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            eos_token_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
        }
    }

    /// Whether any penalty needs to know which tokens stand in the sequence.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}
