//! One request and what its client sees.

use std::time::{Duration, Instant};

use tidemill_proto::v1::{
    FinishReason, GenerateRequest, OutputOptions, SamplingParams, TokenIds, generate_request::Prompt,
    inference_client::InferenceClient,
};
use tonic::{Status, transport::Channel};

/// What is asked for: greedy, token ids only, end-of-sequence tokens ignored.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// Tokens to generate.
    pub max_tokens: u32,
    /// See `GenerateRequest.priority`.
    pub priority: i32,
    /// See `GenerateRequest.tenant`.
    pub tenant: String,
}

/// A message with tokens.
#[derive(Debug, Clone, Copy)]
pub struct Tokens {
    /// How many.
    pub count: usize,
    /// Since the message before it; for the first, since the request was to be sent.
    pub gap: Duration,
    /// Nothing came before.
    pub is_first: bool,
}

/// What the client of a whole answer saw.
#[derive(Debug, Clone)]
pub struct Seen {
    /// From when the request was to be sent to its first token.
    pub ttft: Duration,
    /// Between one token and the next, on average.
    pub mean_itl: Duration,
    /// Prompt tokens that were found in the prefix cache.
    pub cached_tokens: usize,
}

/// Sends a request and tells `on` about every message with tokens.
///
/// # Errors
/// The status that the stream ended with, or DATA_LOSS when tokens are missing.
pub async fn follow(
    client: &InferenceClient<Channel>,
    ask: Ask,
    due: Instant,
    mut on: impl FnMut(Tokens),
) -> Result<Seen, Status> {
    let asked = ask.max_tokens as usize;
    let mut messages = client.clone().generate(request(ask)).await?.into_inner();
    let (mut first, mut last, mut tokens, mut cached_tokens) = (None, due, 0, 0);
    while let Some(message) = messages.message().await? {
        let now = Instant::now();
        if !message.token_ids.is_empty() {
            on(Tokens { count: message.token_ids.len(), gap: now - last, is_first: first.is_none() });
            first.get_or_insert(now);
            last = now;
            tokens += message.token_ids.len();
        }
        if message.finish_reason() == FinishReason::Abort {
            return Err(Status::aborted("someone aborted a stream of the benchmark"));
        }
        cached_tokens = message.usage.map_or(cached_tokens, |usage| usage.cached_tokens as usize);
    }
    match first {
        Some(first) if tokens == asked => {
            let mean_itl = (last - first) / ask_gaps(asked);
            Ok(Seen { ttft: first - due, mean_itl, cached_tokens })
        }
        _ => Err(Status::data_loss(format!("a stream gave {tokens} tokens instead of {asked}"))),
    }
}

/// Gaps between so many tokens, at least 1 so that it divides.
fn ask_gaps(tokens: usize) -> u32 {
    u32::try_from(tokens.saturating_sub(1)).unwrap_or(u32::MAX).max(1)
}

/// Sends a request now and waits for its end.
///
/// # Errors
/// As [`follow`].
pub async fn answer(client: &InferenceClient<Channel>, ask: Ask) -> Result<Seen, Status> {
    follow(client, ask, Instant::now(), |_| ()).await
}

fn request(ask: Ask) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: ask.prompt })),
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(ask.max_tokens),
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        output: Some(OutputOptions { token_ids_only: true, include_special_tokens: false }),
        priority: ask.priority,
        tenant: ask.tenant,
        ..GenerateRequest::default()
    }
}
