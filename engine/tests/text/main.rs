//! Tokenizer, detokeniser, stop strings and chat templates, driven through their public interface.

#![allow(clippy::unwrap_used)]

mod chat;
mod detokenize;
mod folder;
mod forms;
mod hostile;
mod sources;
mod stop;
mod tokenizer;
