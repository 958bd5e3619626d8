//! The vocabulary in messages that every client takes.

use std::sync::Arc;

use futures_util::stream;
use tidemill_engine::{ids::TokenId, text::TextModel};
use tidemill_proto::v1::GetVocabularyResponse;

use super::stream::ResponseStream;

/// Tokens of a message. A token has some ten bytes, and clients take 4 MiB by default.
const CHUNK: usize = 8192;

/// The bytes of all tokens, by id.
pub fn chunks(text: Arc<TextModel>) -> ResponseStream<GetVocabularyResponse> {
    let size = text.vocab_size();
    Box::pin(stream::iter((0..size).step_by(CHUNK).map(move |first| {
        let ids = first..size.min(first + CHUNK);
        let tokens = ids.map(|id| text.token_bytes(TokenId(id as u32)).to_vec()).collect();
        Ok(GetVocabularyResponse { tokens })
    })))
}
