//! Texts for encoders: two in one prompt, and texts that are cut to fit.

use tokenizers::{
    Encoding, PostProcessor, TruncationDirection, TruncationParams, TruncationStrategy, truncate_encodings,
};

use super::{TextModel, guard::caught};
use crate::{error::RequestError, ids::TokenId};

/// Longest text in bytes that is cut to fit: all of it is encoded first.
pub const MAX_CUT_BYTES: usize = 4 << 20;

/// An encoded text, or two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The ids, with the tokenizer's special tokens around and between.
    pub ids: Vec<TokenId>,
    /// Segment of each: mostly 0 for the first text and 1 for the second.
    pub segments: Vec<u32>,
}

impl TextModel {
    /// One text, or two by the tokenizer's template for pairs, with special tokens. With `most`, ends of the texts are left out until all has at most so many
    /// tokens: of the longer text first.
    ///
    /// # Errors
    /// As [`TextModel::encode`]; [`RequestError::Invalid`] where `most` leaves no room for special tokens.
    pub fn encode_pair(
        &self,
        first: &str,
        second: Option<&str>,
        most: Option<usize>,
    ) -> Result<Encoded, RequestError> {
        let encoding = caught(|| self.compose(first, second, most))
            .map_err(|panic| RequestError::Internal(format!("the tokenizer failed: {panic}")))??;
        let ids = encoding.get_ids();
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size()) {
            return Err(RequestError::Internal(format!("the tokenizer gave id {id}, which the model lacks")));
        }
        let ids = ids.iter().copied().map(TokenId).collect();
        Ok(Encoded { ids, segments: encoding.get_type_ids().to_vec() })
    }

    fn compose(
        &self,
        first: &str,
        second: Option<&str>,
        most: Option<usize>,
    ) -> Result<Encoding, RequestError> {
        let words = self.words("text")?;
        let tokenizer = &words.tokenizer;
        let refused = |error| RequestError::invalid("prompt.text", format!("cannot be encoded: {error}"));
        let alone = |text: &str| tokenizer.encode_fast(words.normalized(text), false).map_err(refused);
        let (mut first, mut second) = (alone(first)?, second.map(alone).transpose()?);
        if let Some(most) = most {
            let added = tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(second.is_some()));
            let Some(max_length) = most.checked_sub(added).filter(|&rest| rest > 0) else {
                let message = format!("{most} tokens leave no room for a text beside {added} special tokens");
                return Err(RequestError::invalid("truncate_prompt_tokens", message));
            };
            let (strategy, direction) = (TruncationStrategy::LongestFirst, TruncationDirection::Right);
            let params = TruncationParams { max_length, strategy, stride: 0, direction };
            (first, second) = truncate_encodings(first, second, &params).map_err(refused)?;
        }
        tokenizer.post_process(first, second, true).map_err(refused)
    }
}
