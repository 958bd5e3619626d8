//! The other direction: the engine's terms for an engine behind the wire. Whatever stands in a request is written out, and whatever an answer
//! holds is read, so that a front end cannot tell such an engine from one in its own process.
//!
//! Structs are taken apart and put together with every field named: one that is new on either side does not compile until it is
//! translated here.

mod activity;
mod control;
mod error;
mod model;
mod request;
mod response;
#[cfg(test)]
mod tests;

pub use activity::activity;
pub use control::{abort_receipt, engine_stats};
pub use error::{call_error, call_error_of};
pub use model::{adapters, model_card};
pub use request::{chat_message, embed_message, generate_message, score_message};
pub use response::{embedding, output, score};

use std::time::Duration;

use crate::client::CallError;

/// A time that came as seconds.
fn duration(seconds: f64) -> Result<Duration, CallError> {
    Duration::try_from_secs_f64(seconds).map_err(|_| malformed("a time"))
}

/// What an engine says that cannot be.
fn malformed(what: &str) -> CallError {
    CallError::internal(&format!("the engine's answer is malformed: {what}"))
}
