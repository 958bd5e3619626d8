//! The simulated model: what keys and values are, and what follows from them.
//!
//! Keys and values of a position depend on its token and on everything before it, as a model's do. So a block with the right tokens
//! behind the wrong beginning is as wrong as one with other tokens.

use std::{collections::BTreeMap, ops::Range};

use tidemill_engine::{Pooling, ids::TokenId, output::FinishReason};

/// Token ids below this are the model's.
pub const VOCAB: u32 = 97;
/// Ends a completion unless its request ignores it.
pub const EOS: TokenId = TokenId(13);

/// splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): one round.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Keys and values of one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kv {
    pub token: TokenId,
    /// Stands for what the values owe to all positions up to here.
    pub chain: u64,
}

impl Kv {
    /// What no healthy step writes.
    pub const RUBBISH: Self = Self { token: TokenId(9999), chain: 0xBAD };

    /// Keys and values of a sequence's first token, or of the one behind `self`.
    pub fn after(previous: Option<Self>, token: TokenId) -> Self {
        let chain = previous.map_or(1, |kv| kv.chain);
        Self { token, chain: mix(chain ^ u64::from(token.0) << 32) }
    }
}

/// Attention over positions, oldest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attention(u64);

impl Attention {
    /// Reads one more position.
    pub fn read(&mut self, kv: Kv) {
        self.0 =
            (self.0 ^ kv.chain ^ u64::from(kv.token.0)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
    }

    /// The token chosen after everything that was read. It depends on what the host says about the output so far. A token that is forbidden
    /// may come nevertheless: the host must then not stop there.
    pub fn choose(self, seed: u64, counts: &[(TokenId, u32)], forbid_stops: bool) -> TokenId {
        let counts = counts.iter().fold(u64::from(forbid_stops), |sum, &(token, count)| {
            mix(sum ^ u64::from(token.0) << 32 ^ u64::from(count))
        });
        TokenId((mix(self.0 ^ seed ^ counts.rotate_left(7)) % u64::from(VOCAB)) as u32)
    }

    /// The hidden state of the position that was read last: integers, so that sums of them are exact.
    pub fn state(self) -> [f32; 2] {
        [0, 32].map(|shift| (mix(self.0) >> shift & 0xFF_FFFF) as f32)
    }

    /// The log-probability of a token after everything that was read.
    pub fn score(self, token: TokenId) -> f32 {
        -((mix(self.0 ^ u64::from(token.0)) >> 48) as f32)
    }
}

/// What goes wrong with a sequence, once a row of it reaches so many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fate {
    #[default]
    Healthy,
    /// Every step with such a row fails as a whole.
    Poison(u16),
    /// The row's logits are not finite, or one of the hidden states that it gives.
    NotFinite(u16),
}

/// How a sequence ends when nobody interferes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Finished(FinishReason),
    Embedded,
    Broken(Fate),
}

/// What a sequence is and does when it runs alone on a machine of its own.
#[derive(Debug)]
pub struct Script {
    pub prompt_len: usize,
    /// Prompt and output.
    pub tokens: Vec<TokenId>,
    /// Keys and values of `tokens`.
    pub kv: Vec<Kv>,
    /// Log-probabilities of `prompt[1..]`.
    pub scores: Vec<f32>,
    /// Hidden states of the prompt.
    pub states: Vec<[f32; 2]>,
    pub end: End,
}

/// What decides a sequence's output, besides its prompt.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    pub seed: u64,
    pub fate: Fate,
    pub min_tokens: usize,
    pub max_tokens: usize,
    pub ignore_eos: bool,
    pub penalties: bool,
    pub pooling: Option<Pooling>,
}

impl Script {
    pub fn alone(prompt: &[TokenId], part: &Part) -> Self {
        let (mut kv, mut scores, mut states) = (Vec::new(), Vec::new(), Vec::new());
        let mut attention = Attention::default();
        for &token in prompt {
            if !kv.is_empty() {
                scores.push(attention.score(token));
            }
            kv.push(Kv::after(kv.last().copied(), token));
            attention.read(*kv.last().expect("pushed just now"));
            states.push(attention.state());
        }
        if let Some(pooling) = part.pooling {
            let end = Self::end_of_embedding(prompt.len(), pooling, part.fate);
            return Self { prompt_len: prompt.len(), tokens: prompt.to_vec(), kv, scores, states, end };
        }
        let mut counts: BTreeMap<TokenId, u32> = BTreeMap::new();
        if part.penalties {
            counts.extend(prompt.iter().map(|&token| (token, 0)));
        }
        let mut tokens = prompt.to_vec();
        let end = loop {
            let reached = |limit: u16| tokens.len() >= usize::from(limit);
            if matches!(part.fate, Fate::Poison(limit) | Fate::NotFinite(limit) if reached(limit)) {
                break End::Broken(part.fate);
            }
            let generated = tokens.len() - prompt.len();
            let listed: Vec<_> = counts.iter().map(|(&token, &count)| (token, count)).collect();
            let token = attention.choose(part.seed, &listed, generated < part.min_tokens);
            if part.penalties {
                *counts.entry(token).or_insert(0) += 1;
            }
            tokens.push(token);
            kv.push(Kv::after(kv.last().copied(), token));
            attention.read(*kv.last().expect("pushed just now"));
            if generated + 1 >= part.min_tokens && token == EOS && !part.ignore_eos {
                break End::Finished(FinishReason::Stop);
            }
            if generated + 1 == part.max_tokens {
                break End::Finished(FinishReason::Length);
            }
        };
        Self { prompt_len: prompt.len(), tokens, kv, scores, states, end }
    }

    fn end_of_embedding(prompt_len: usize, pooling: Pooling, fate: Fate) -> End {
        let breaks = match fate {
            Fate::Healthy => false,
            Fate::Poison(limit) => prompt_len >= usize::from(limit),
            Fate::NotFinite(limit) => Self::counts(pooling, prompt_len).end >= usize::from(limit),
        };
        if breaks { End::Broken(fate) } else { End::Embedded }
    }

    /// The positions whose states count.
    fn counts(pooling: Pooling, prompt_len: usize) -> Range<usize> {
        match pooling {
            Pooling::Last => prompt_len - 1..prompt_len,
            Pooling::Mean => 0..prompt_len,
            Pooling::Cls => 0..1,
        }
    }

    /// The embedding of the prompt.
    pub fn embedding(&self, pooling: Pooling) -> Vec<f32> {
        let states = &self.states[Self::counts(pooling, self.prompt_len)];
        let mean = |at| states.iter().map(|state| f64::from(state[at])).sum::<f64>() / states.len() as f64;
        [0, 1].map(|at| mean(at) as f32).to_vec()
    }

    /// The output.
    pub fn output(&self) -> &[TokenId] {
        &self.tokens[self.prompt_len..]
    }

    pub fn prompt(&self) -> &[TokenId] {
        &self.tokens[..self.prompt_len]
    }
}
