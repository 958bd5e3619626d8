//! Text in, ids out, and back: tokenizer, chat template, streaming detokeniser, stop strings, the forms of answers.
//!
//! All of it runs on the caller's side, off the engine thread. A [`TextModel`] is cheap to clone and shared.

mod bound;
mod guard;
mod pairs;
mod pyjson;
mod sources;
mod vocab;

pub mod chat;
pub mod detokenize;
pub mod grammar;
pub mod stop;
pub mod tokenizer;

pub use chat::{ChatMessage, ChatPrompt};
pub use detokenize::Detokenizer;
pub use pairs::{Encoded, MAX_CUT_BYTES};
pub use sources::TokenizerKind;
pub use stop::{StopMatcher, StopStep};
pub use tokenizer::TextModel;
