//! The simulated model: what keys and values are, and what follows from them.
//!
//! Keys and values of a position depend on its token and on everything before it, as a model's do. So a block with the right tokens
//! behind the wrong beginning is as wrong as one with other tokens.

use std::{collections::BTreeMap, ops::Range};

use tidemill_engine::{Pooling, constraint::Constraint, ids::TokenId, output::FinishReason};

use crate::forms::Fake;

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

    /// Keys and values of a sequence's first token, or of the one behind `self`, as an adapter makes them; 0 is none.
    pub fn after(previous: Option<Self>, token: TokenId, adapter: u64) -> Self {
        let chain = previous.map_or(1, |kv| kv.chain);
        Self { token, chain: mix(chain ^ u64::from(token.0) << 32 ^ adapter << 12) }
    }
}

/// What the host says about a choice.
#[derive(Debug, Clone, Copy)]
pub struct How<'a> {
    pub counts: &'a [(TokenId, u32)],
    pub forbid_stops: bool,
    /// A bit per token.
    pub allowed: Option<&'a [u32]>,
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
    pub fn choose(self, seed: u64, how: How<'_>) -> TokenId {
        let counts = how.counts.iter().fold(u64::from(how.forbid_stops), |sum, &(token, count)| {
            mix(sum ^ u64::from(token.0) << 32 ^ u64::from(count))
        });
        let first = (mix(self.0 ^ seed ^ counts.rotate_left(7)) % u64::from(VOCAB)) as u32;
        let is_allowed =
            |token: &u32| how.allowed.is_none_or(|mask| mask[*token as usize / 32] >> (token % 32) & 1 == 1);
        TokenId((first..VOCAB).chain(0..first).find(is_allowed).expect("some token is allowed"))
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
    /// Its constraint said that it is complete.
    Complete,
    /// Its constraint cannot go on.
    Unformed,
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
    pub form: bool,
    /// 0: none.
    pub adapter: u64,
}

/// A sequence in the making.
struct Alone {
    prompt_len: usize,
    tokens: Vec<TokenId>,
    kv: Vec<Kv>,
    attention: Attention,
    counts: BTreeMap<TokenId, u32>,
    adapter: u64,
}

impl Script {
    pub fn alone(prompt: &[TokenId], part: &Part) -> Self {
        let (mut scores, mut states) = (Vec::new(), Vec::new());
        let mut alone = Alone::new(part.adapter);
        for &token in prompt {
            if !alone.kv.is_empty() {
                scores.push(alone.attention.score(token));
            }
            alone.push(token);
            states.push(alone.attention.state());
        }
        alone.prompt_len = prompt.len();
        if let Some(pooling) = part.pooling {
            let end = Self::end_of_embedding(prompt.len(), pooling, part.fate);
            return Self {
                prompt_len: prompt.len(),
                tokens: alone.tokens,
                kv: alone.kv,
                scores,
                states,
                end,
            };
        }
        if part.penalties {
            alone.counts.extend(prompt.iter().map(|&token| (token, 0)));
        }
        let end = alone.run(part);
        Self { prompt_len: prompt.len(), tokens: alone.tokens, kv: alone.kv, scores, states, end }
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
            Pooling::Cls => 0..1,
            _ => 0..prompt_len,
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

impl Alone {
    fn new(adapter: u64) -> Self {
        Self {
            adapter,
            prompt_len: 0,
            tokens: Vec::new(),
            kv: Vec::new(),
            attention: Attention::default(),
            counts: BTreeMap::new(),
        }
    }

    fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        let kv = Kv::after(self.kv.last().copied(), token, self.adapter);
        self.kv.push(kv);
        self.attention.read(kv);
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Takes a generated token in. True when it ends the sequence by what it is.
    fn generate(&mut self, part: &Part, token: TokenId) -> bool {
        if part.penalties {
            *self.counts.entry(token).or_insert(0) += 1;
        }
        self.push(token);
        self.generated() >= part.min_tokens && token == EOS && !part.ignore_eos
    }

    fn run(&mut self, part: &Part) -> End {
        let mut form = part.form.then(|| Fake::new(part.seed));
        let mut allowed = form.as_ref().map(Fake::first);
        loop {
            let reached = |limit: u16| self.tokens.len() >= usize::from(limit);
            if matches!(part.fate, Fate::Poison(limit) | Fate::NotFinite(limit) if reached(limit)) {
                return End::Broken(part.fate);
            }
            let counts: Vec<_> = self.counts.iter().map(|(&token, &count)| (token, count)).collect();
            let stops = if part.ignore_eos { Vec::new() } else { vec![EOS] };
            let must_stop = allowed.as_ref().is_some_and(|allowed| allowed.leaves_only(stops.iter()));
            let how = How {
                counts: &counts,
                forbid_stops: self.generated() < part.min_tokens && !must_stop,
                allowed: allowed.as_ref().and_then(|allowed| allowed.mask()).map(|mask| &mask[..]),
            };
            let token = self.attention.choose(part.seed, how);
            if self.generate(part, token) {
                return End::Finished(FinishReason::Stop);
            }
            if let Some(form) = &mut form {
                let Ok(advance) = form.advance(token, part.max_tokens - self.generated()) else {
                    return End::Unformed;
                };
                for token in advance.forced {
                    if self.generate(part, token) {
                        return End::Finished(FinishReason::Stop);
                    }
                }
                if advance.then.is_none() {
                    return End::Complete;
                }
                allowed = advance.then;
            }
            if self.generated() == part.max_tokens {
                return End::Finished(FinishReason::Length);
            }
        }
    }
}
