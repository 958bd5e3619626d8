//! A grammar as a constraint.

use std::{fmt, sync::Arc};

use llguidance::Matcher;
use parking_lot::Mutex;

use super::{compile::told, tokens::Tokens};
use crate::{
    constraint::{Advance, Allowed, Constraint},
    ids::TokenId,
};

/// A compiled grammar.
pub(super) struct Grammar {
    /// In its first state. Completions get clones that share nothing: what one of them makes the parser find out, or spend, is nothing to another.
    matcher: Mutex<Matcher>,
    first: Allowed,
    tokens: Arc<Tokens>,
}

impl Grammar {
    /// Of a matcher that has consumed nothing.
    ///
    /// # Errors
    /// When the grammar has an error, or no text.
    pub fn new(mut matcher: Matcher, tokens: Arc<Tokens>) -> Result<Self, String> {
        if let Some(error) = matcher.get_error() {
            return Err(told(&error));
        }
        let empty = || String::from("matches nothing but the empty text");
        if matcher.is_stopped() {
            return Err(empty());
        }
        let mask = matcher.compute_mask().map_err(|error| no_mask(&error.to_string()))?;
        let mask = words(mask.as_slice(), tokens.vocab);
        try_only(&matcher, &mask)?;
        // Where a completion begins, tokens that are shown otherwise than within a text would be misread.
        let mask: Arc<[u32]> = mask.iter().zip(&*tokens.at_start).map(|(mask, start)| mask & start).collect();
        if mask.iter().all(|&word| word == 0) {
            return Err("matches nothing that this model can begin an answer with".into());
        }
        let first = Allowed::Among(mask);
        if first.leaves_only(tokens.eos.iter()) {
            return Err(empty());
        }
        Ok(Self { matcher: Mutex::new(matcher), first, tokens })
    }

    /// The beginning of a completion.
    pub fn begin(&self, jump_ahead: bool) -> Box<dyn Constraint> {
        Box::new(Matching {
            matcher: self.matcher.lock().deep_clone(),
            first: self.first.clone(),
            tokens: self.tokens.clone(),
            jump_ahead: jump_ahead && self.tokens.is_exact,
        })
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

/// A completion that a grammar is made to match.
struct Matching {
    matcher: Matcher,
    first: Allowed,
    tokens: Arc<Tokens>,
    jump_ahead: bool,
}

impl Constraint for Matching {
    fn first(&self) -> Allowed {
        self.first.clone()
    }

    fn advance(&mut self, token: TokenId, room: usize) -> Result<Advance, String> {
        self.consume(&[token.0])?;
        let mut forced = Vec::new();
        while !self.is_complete()? {
            let next = self.forced(room - forced.len());
            if next.is_empty() {
                let then = if forced.len() < room { self.allowed()? } else { Some(Allowed::Any(1)) };
                return Ok(Advance { forced, then });
            }
            self.consume(&next)?;
            forced.extend(next.into_iter().map(TokenId));
        }
        Ok(Advance { forced, then: None })
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Self {
            matcher: self.matcher.deep_clone(),
            first: self.first.clone(),
            tokens: self.tokens.clone(),
            jump_ahead: self.jump_ahead,
        })
    }
}

impl Matching {
    fn consume(&mut self, tokens: &[u32]) -> Result<(), String> {
        self.matcher.consume_tokens(tokens).map_err(|error| told(&error.to_string()))
    }

    /// Whether nothing can follow, or need follow where the model has no way to say that it is done.
    fn is_complete(&mut self) -> Result<bool, String> {
        if self.matcher.is_stopped() {
            return match self.matcher.stop_reason() {
                reason if reason.is_ok() => Ok(true),
                reason => Err(reason.to_string()),
            };
        }
        let must_guess = self.tokens.eos.is_empty();
        Ok(must_guess && self.matcher.is_accepting().map_err(|error| told(&error.to_string()))?)
    }

    /// Tokens to which there is no alternative, at most `room`.
    fn forced(&mut self, room: usize) -> Vec<u32> {
        if room == 0 || !self.jump_ahead {
            return Vec::new();
        }
        let mut forced = self.matcher.compute_ff_tokens();
        forced.truncate(room);
        forced
    }

    /// What may come next; nothing where only the end can.
    fn allowed(&mut self) -> Result<Option<Allowed>, String> {
        let mask = self.matcher.compute_mask().map_err(|error| no_mask(&error.to_string()))?;
        let allowed = Allowed::Among(words(mask.as_slice(), self.tokens.vocab).into());
        Ok(if allowed.leaves_only(self.tokens.eos.iter()) { None } else { Some(allowed) })
    }
}

impl fmt::Debug for Matching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matching").field("jump_ahead", &self.jump_ahead).finish_non_exhaustive()
    }
}

/// Why there is no mask, from llguidance's words.
fn no_mask(error: &str) -> String {
    match told(error).as_str() {
        "NoExtensionBias" => "nothing that this model can write matches".into(),
        said => format!("is too complex: {said}"),
    }
}

/// Where only one token can be the first, tries what follows: a grammar that forces tokens without end shows there.
fn try_only(matcher: &Matcher, mask: &[u32]) -> Result<(), String> {
    let Some(word) = mask.iter().position(|&bits| bits != 0) else { return Ok(()) };
    if mask.iter().map(|bits| bits.count_ones()).sum::<u32>() > 1 {
        return Ok(());
    }
    let token = 32 * word as u32 + mask[word].trailing_zeros();
    let mut ahead = matcher.deep_clone();
    let consumed = ahead.consume_tokens(&[token]).map_err(|error| no_mask(&error.to_string()));
    match consumed {
        Ok(()) if !ahead.is_stopped() => {
            ahead.compute_mask().map(drop).map_err(|error| no_mask(&error.to_string()))
        }
        consumed => consumed,
    }
}

/// The bits of the vocabulary: llguidance has room for one more.
fn words(mask: &[u32], vocab: usize) -> Vec<u32> {
    let mut words = mask[..vocab.div_ceil(32)].to_vec();
    if let (Some(last), rest @ 1..) = (words.last_mut(), vocab % 32) {
        *last &= (1 << rest) - 1;
    }
    words
}
