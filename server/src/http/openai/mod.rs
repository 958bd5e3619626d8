//! OpenAI's API, with what vLLM adds to it.

pub mod chat;
mod chunks;
pub mod completions;
pub mod embeddings;
mod logprobs;
pub mod lora;
pub mod models;
pub mod rerank;
pub mod responses;
pub mod score;
pub mod tools;

use serde::Serialize;
use serde_json::{Value, json};
use tidemill_engine::output::Usage as EngineUsage;

use super::ApiError;

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct CompletionDetails {
    reasoning_tokens: usize,
}

impl Usage {
    /// Before anything was generated.
    pub fn of_prompt(prompt_tokens: usize) -> Self {
        Self { prompt_tokens, total_tokens: prompt_tokens, ..Self::default() }
    }

    /// Adds tokens of a choice as they come.
    pub fn add(&mut self, new_tokens: usize) {
        self.completion_tokens += new_tokens;
        self.total_tokens += new_tokens;
    }

    /// Adds what is known at a choice's end. A prompt counts once: with its `first` choice, which has read it.
    pub fn end(&mut self, usage: &EngineUsage, first: bool, reasoning_tokens: usize) {
        if first {
            self.prompt_tokens_details.cached_tokens += usage.cached_tokens;
        }
        self.completion_tokens_details.reasoning_tokens += reasoning_tokens;
    }

    /// Adds another prompt and its choices.
    pub fn merge(&mut self, other: &Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.total_tokens += other.total_tokens;
        self.prompt_tokens_details.cached_tokens += other.prompt_tokens_details.cached_tokens;
    }
}

/// What to add to a stream.
#[derive(Debug, Clone, Copy, Default, serde::Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// Usage on every chunk.
    pub continuous_usage_stats: bool,
}

/// `stream_options` make sense with `stream` only.
///
/// # Errors
/// 400 when they come without.
pub fn stream_options(stream: bool, options: Option<StreamOptions>) -> Result<StreamOptions, ApiError> {
    match options {
        Some(_) if !stream => {
            Err(ApiError::invalid("stream_options", "can only be given with `stream: true`"))
        }
        options => Ok(options.unwrap_or_default()),
    }
}

/// The error that ends a stream.
pub fn stream_error(error: crate::client::CallError) -> Value {
    let error = ApiError::from(error);
    json!({"error": {"message": error.message, "type": "server_error", "param": error.param, "code": error.code}})
}
