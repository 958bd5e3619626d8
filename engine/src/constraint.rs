//! What the next token of a sequence may be, besides what the model wants.
//!
//! The scheduler holds a [`Constraint`] for each sequence that has one and tells it every token that was chosen; it answers what may follow. What a
//! constraint is made of (a grammar, the marks of thoughts) is none of the scheduler's business.

use std::{fmt::Debug, sync::Arc};

use rayon::prelude::*;

use crate::ids::TokenId;

/// The tokens that may be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// Any; and whatever they are, any for so many tokens in all, at least 1: these can be chosen before the host knows the ones before.
    Any(usize),
    /// Those whose bits are set, at least one: a bit per token of the vocabulary, the lowest token in the lowest bit of the first word.
    Among(Arc<[u32]>),
}

impl Allowed {
    /// Whether a token can be chosen freely behind so many that nobody knows yet.
    pub fn is_free_behind(&self, unknown: usize) -> bool {
        matches!(self, Self::Any(tokens) if *tokens > unknown)
    }

    /// The bits of those allowed; none for all.
    pub fn mask(&self) -> Option<&Arc<[u32]>> {
        match self {
            Self::Any(_) => None,
            Self::Among(mask) => Some(mask),
        }
    }

    /// Whether one of these tokens has to be chosen.
    pub fn leaves_only<'a>(&self, tokens: impl Iterator<Item = &'a TokenId> + Clone) -> bool {
        let Self::Among(mask) = self else { return false };
        mask.iter().zip(0..).filter(|(bits, _)| **bits != 0).all(|(&bits, word)| {
            let own = tokens.clone().filter(|token| token.0 / 32 == word);
            own.fold(bits, |bits, token| bits & !(1 << (token.0 % 32))) == 0
        })
    }
}

/// What follows from a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advance {
    /// Tokens behind it to which there is no alternative; the constraint has taken them in.
    pub forced: Vec<TokenId>,
    /// What may come behind those; nothing when the text is complete and nothing can follow.
    pub then: Option<Allowed>,
}

/// What the tokens of one sequence may be. What it says depends on its own tokens alone.
pub trait Constraint: Debug + Send {
    /// What the first token may be.
    fn first(&self) -> Allowed;

    /// Takes the next token in. At most `room` tokens come behind it, so no more are forced; with no room, what may follow need not
    /// be found out, but for the end.
    ///
    /// # Errors
    /// In words for the client, when the sequence cannot go on.
    fn advance(&mut self, token: TokenId, room: usize) -> Result<Advance, String>;

    /// Another one in the same state, which shares nothing that changes.
    fn fork(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        self.fork()
    }
}

/// A constraint that is to take a token in.
#[derive(Debug)]
pub struct Turn {
    /// Whose turn it is.
    pub constraint: Box<dyn Constraint>,
    /// The token that was chosen.
    pub token: TokenId,
    /// Tokens that may come behind it.
    pub room: usize,
}

/// Lets constraints take their tokens in, side by side: each takes some 50 µs over a usual vocabulary, and sequences wait for it.
pub fn advance_all(turns: &mut [Turn]) -> Vec<Result<Advance, String>> {
    let advance = |turn: &mut Turn| turn.constraint.advance(turn.token, turn.room);
    match turns {
        [turn] => vec![advance(turn)],
        turns => turns.par_iter_mut().with_max_len(1).map(advance).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_without_some_tokens() {
        let among = |bits: &[u32]| Allowed::Among(bits.into());
        let stops = [TokenId(3), TokenId(40)];
        assert!(among(&[8, 256]).leaves_only(stops.iter()));
        assert!(among(&[8, 0]).leaves_only(stops.iter()));
        assert!(!among(&[9, 256]).leaves_only(stops.iter()));
        assert!(!among(&[8, 1]).leaves_only(stops.iter()));
        assert!(!Allowed::Any(1).leaves_only(stops.iter()));
    }

    #[test]
    fn a_free_token_is_free_behind_fewer_than_were_promised() {
        assert!(Allowed::Any(2).is_free_behind(1) && !Allowed::Any(2).is_free_behind(2));
        assert!(!Allowed::Among([1].into()).is_free_behind(0));
    }
}
