//! Prompts become token ids, of which there may be only so many.

use std::fmt::Display;

use super::{Prompt, Validator};
use crate::{error::RequestError, ids::TokenId};

/// What a prompt is encoded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// At least one token follows it.
    Generate,
    /// Nothing follows it.
    Embed,
}

impl Validator {
    pub(super) fn outside_vocabulary(&self, id: Option<TokenId>) -> String {
        format!("token id {} is outside the vocabulary of {}", id.map_or(0, |id| id.0), self.vocab_size)
    }

    pub(super) fn encode(&self, prompt: Prompt, purpose: Purpose) -> Result<Vec<TokenId>, RequestError> {
        let (ids, field) = match prompt {
            Prompt::Text(text) => {
                self.refuse_gigantic(text.len(), "prompt.text", purpose)?;
                (self.text.encode(&text, true)?, "prompt.text")
            }
            Prompt::Chat(chat) => {
                let text = self.text.render_chat(&chat)?;
                self.refuse_gigantic(text.len(), "prompt.chat", purpose)?;
                (self.text.encode(&text, false)?, "prompt.chat")
            }
            Prompt::TokenIds(ids) => {
                if let Some(bad) = ids.iter().find(|id| id.0 as usize >= self.vocab_size) {
                    return Err(RequestError::invalid(
                        "prompt.token_ids",
                        self.outside_vocabulary(Some(*bad)),
                    ));
                }
                (ids, "prompt.token_ids")
            }
        };
        if ids.is_empty() {
            return Err(RequestError::invalid(field, "the prompt is empty; give at least one token"));
        }
        if ids.len() > self.longest_prompt(purpose) {
            return Err(self.too_long(field, ids.len(), purpose));
        }
        Ok(ids)
    }

    pub(super) fn longest_prompt(&self, purpose: Purpose) -> usize {
        match purpose {
            Purpose::Generate => self.max_model_len - 1,
            Purpose::Embed => self.heads.texts.max_seq_length.unwrap_or(usize::MAX).min(self.max_model_len),
        }
    }

    /// Whether the model scores pairs and does nothing else.
    pub(super) fn scores_only(&self) -> bool {
        self.scoring.is_some_and(|scoring| scoring.is_only_output)
    }

    /// A text that cannot fit whatever its tokens are is refused before time is spent on encoding it.
    pub(super) fn refuse_gigantic(
        &self,
        bytes: usize,
        field: &'static str,
        purpose: Purpose,
    ) -> Result<(), RequestError> {
        let least = self.text.min_tokens_for_bytes(bytes);
        let fits = least <= self.longest_prompt(purpose);
        if fits { Ok(()) } else { Err(self.too_long(field, format_args!("at least {least}"), purpose)) }
    }

    pub(super) fn too_long(
        &self,
        field: &'static str,
        tokens: impl Display,
        purpose: Purpose,
    ) -> RequestError {
        let (most, of) = (self.longest_prompt(purpose), self.max_model_len);
        let message = match purpose {
            Purpose::Generate => format!(
                "the prompt has {tokens} tokens; with one token to generate, at most {most} fit max_model_len {of}"
            ),
            Purpose::Embed => format!(
                "the prompt has {tokens} tokens; at most {most} are taken (max_model_len is {of}); shorten it, or have a text cut with \
                 truncate_prompt_tokens: -1"
            ),
        };
        RequestError::invalid(field, message)
    }
}
