//! A constraint without a grammar: what it says follows from the tokens that it was told, by a hash.

use tidemill_engine::{
    constraint::{Advance, Allowed, Constraint},
    ids::TokenId,
};

use crate::model::{EOS, VOCAB, mix};

/// Forces tokens, keeps promises, completes and fails, by chance that is the same every time.
#[derive(Debug, Clone)]
pub struct Fake {
    state: u64,
    /// Tokens that were promised to be free.
    free: usize,
}

impl Fake {
    pub fn new(seed: u64) -> Self {
        let state = mix(seed ^ 0xF0F0);
        Self { state, free: promise(state) }
    }

    fn see(&mut self, token: TokenId) {
        self.state = mix(self.state ^ u64::from(token.0) << 20);
    }

    fn allowed(&self) -> Allowed {
        if self.free > 0 {
            return Allowed::Any(self.free);
        }
        let mut words: Vec<u32> =
            (0..u64::from(VOCAB.div_ceil(32))).map(|word| mix(self.state ^ word << 40) as u32).collect();
        if self.state % 64 < 3 {
            words.fill(0);
            words[EOS.0 as usize / 32] |= 1 << (EOS.0 % 32);
        }
        let (last, own) = (words.len() - 1, self.state as u32 % VOCAB);
        words[last] &= (1 << (VOCAB % 32)) - 1;
        if words.iter().all(|&word| word == 0) {
            words[own as usize / 32] |= 1 << (own % 32);
        }
        Allowed::Among(words.into())
    }
}

/// Tokens that are free from here on.
fn promise(state: u64) -> usize {
    if state.is_multiple_of(4) { 1 + (state >> 8) as usize % 4 } else { 0 }
}

impl Constraint for Fake {
    fn first(&self) -> Allowed {
        self.allowed()
    }

    fn advance(&mut self, token: TokenId, room: usize) -> Result<Advance, String> {
        self.see(token);
        if self.free > 1 {
            self.free -= 1;
            return Ok(Advance { forced: Vec::new(), then: Some(Allowed::Any(self.free)) });
        }
        let luck = self.state >> 16;
        let is_complete = luck % 100 < 6;
        if luck % 100 == 99 {
            return Err("as chance has it".into());
        }
        let forced = if luck % 7 < 2 { 1 + (luck >> 8) % 14 } else { 0 };
        let tokens = (0..forced).map(|at| TokenId((mix(self.state ^ at) % u64::from(VOCAB)) as u32));
        let forced: Vec<TokenId> = tokens.take(room).collect();
        forced.iter().for_each(|&token| self.see(token));
        self.free = promise(self.state);
        Ok(Advance { forced, then: (!is_complete).then(|| self.allowed()) })
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}
