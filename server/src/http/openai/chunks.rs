//! What the chunks of chats and completions have in common.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::{StreamOptions, Usage};
use crate::{
    client::ModelCard,
    clock::since_1970,
    http::{answer::StopReason, sse},
};

/// What every chunk of an answer begins with, and the answer in one piece too.
#[derive(Debug)]
pub struct Head {
    /// The answer's name.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// What answers.
    pub card: Arc<ModelCard>,
    object: &'static str,
}

#[derive(Serialize)]
struct Chunk<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

impl Head {
    /// The head of an answer that begins now; `object` is what its chunks are.
    pub fn new(id: String, object: &'static str, card: Arc<ModelCard>) -> Self {
        Self { id, created: since_1970().as_secs(), card, object }
    }

    /// Appends a chunk with one choice, and with the usage so far where that was asked for.
    pub fn choice(&self, buffer: &mut Vec<u8>, choice: impl Serialize, usage: Usage, options: StreamOptions) {
        // OpenAI sends `usage: null` on every chunk when the last one will have it.
        let usage = match options {
            StreamOptions { continuous_usage_stats: true, .. } => Some(Some(usage)),
            StreamOptions { include_usage: true, .. } => Some(None),
            _ => None,
        };
        self.chunk(buffer, &[choice], usage);
    }

    /// Appends the end of a stream, with the usage before it where that was asked for.
    pub fn end(&self, buffer: &mut Vec<u8>, usage: Usage, options: StreamOptions) {
        if options.include_usage {
            self.chunk::<()>(buffer, &[], Some(Some(usage)));
        }
        sse::done(buffer);
    }

    fn chunk<C: Serialize>(&self, buffer: &mut Vec<u8>, choices: &[C], usage: Option<Option<Usage>>) {
        let (id, model) = (&self.id, &self.card.served_model_name);
        sse::data(buffer, &Chunk { id, object: self.object, created: self.created, model, choices, usage });
    }
}

/// vLLM's word for the client's stop condition that ended a choice.
pub fn stop_reason(reason: &StopReason) -> Option<Value> {
    match reason {
        StopReason::StopString(text) => Some(json!(text)),
        StopReason::StopToken(id) => Some(json!(id)),
        _ => None,
    }
}
