//! Token ids to text, one token at a time.

use std::sync::Arc;

use crate::{
    ids::TokenId,
    text::vocab::{Invalid, TokenKind, TokenTable},
};

/// Decodes a growing sequence: the deltas put together are exactly what [`TextModel::decode`](super::TextModel::decode)
/// gives for the whole. Constant time per token; holds back at most the bytes of one incomplete character.
///
/// Bytes that are no UTF-8 become U+FFFD, as many as the tokenizer's own decoder gives: one per maximal invalid sequence
/// (byte-level tokenizers) or one per byte (byte-fallback tokenizers). The latter would, knowing the whole run of byte
/// tokens, also give up the valid characters in a run that contains an invalid byte; a stream has sent those already, and
/// keeps them.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    table: Arc<TokenTable>,
    include_special: bool,
    /// No token has been decoded yet.
    at_start: bool,
    /// Characters that may still be stripped from the start.
    strip: usize,
    /// Bytes of an incomplete character.
    pending: Vec<u8>,
}

impl Detokenizer {
    pub(super) fn new(table: Arc<TokenTable>, include_special: bool) -> Self {
        let strip = table.strip_start.map_or(0, |(_, count)| count);
        Self { table, include_special, at_start: true, strip, pending: Vec::new() }
    }

    /// Takes the next token and returns the new text; often empty while a character is incomplete. An id outside of the
    /// vocabulary has no text.
    pub fn push(&mut self, id: TokenId) -> String {
        let mut text = String::new();
        self.push_into(id, &mut text);
        text
    }

    /// As [`Detokenizer::push`], appending to `text`.
    pub fn push_into(&mut self, id: TokenId, text: &mut String) {
        match self.table.kind(id.0) {
            TokenKind::Absent => return,
            TokenKind::Special if !self.include_special => return,
            TokenKind::Text | TokenKind::Special => {}
        }
        let bytes = if self.at_start { self.table.first_bytes(id.0) } else { self.table.bytes(id.0) };
        self.at_start = false;
        self.pending.extend_from_slice(bytes);
        self.drain(false, text);
    }

    /// The end of the sequence: the incomplete character, if any, as U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.drain(true, &mut text);
        text
    }

    fn drain(&mut self, at_end: bool, text: &mut String) {
        let start = text.len();
        let (mut read, mut kept) = (0, 0);
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            read += chunk.valid().len() + invalid.len();
            // At the end of what there is, a sequence without `error_len` is one that more bytes could complete.
            let is_last = read == self.pending.len();
            if is_last
                && !at_end
                && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none())
            {
                kept = invalid.len();
            } else if !invalid.is_empty() {
                let count = if self.table.invalid == Invalid::PerByte { invalid.len() } else { 1 };
                text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
            }
        }
        self.pending.drain(..self.pending.len() - kept);
        self.strip_start(start, text);
    }

    /// Removes what the decoder strips from the start of the whole text.
    fn strip_start(&mut self, start: usize, text: &mut String) {
        let Some((strip, _)) = self.table.strip_start else { return };
        while self.strip > 0 && start < text.len() {
            if text[start..].starts_with(strip) {
                text.remove(start);
                self.strip -= 1;
            } else {
                self.strip = 0;
            }
        }
    }
}
