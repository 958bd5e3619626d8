//! Concurrent streams against a running server.

use std::time::{Duration, Instant};

use tidemill_proto::v1::{
    FinishReason, GenerateRequest, OutputOptions, SamplingParams, TokenIds, generate_request::Prompt,
    inference_client::InferenceClient,
};
use tonic::transport::Channel;

/// One wave of streams that start together.
#[derive(Debug, Clone)]
pub struct Wave {
    /// Streams at once.
    pub streams: usize,
    /// Tokens of each prompt; the prompts differ.
    pub prompt_tokens: usize,
    /// Tokens that each stream generates, end-of-sequence tokens ignored.
    pub max_tokens: u32,
    /// Prompt tokens are drawn below this.
    pub vocab_size: u32,
    /// Makes the prompts of one wave differ from another's.
    pub salt: u64,
}

/// What one stream saw.
#[derive(Debug, Clone)]
pub struct StreamTiming {
    /// From sending the request to its first token.
    pub ttft: Duration,
    /// Between one message with tokens and the next.
    pub gaps: Vec<Duration>,
    /// Tokens received.
    pub tokens: usize,
    /// From sending the request to its end.
    pub total: Duration,
}

/// A wave's timings.
#[derive(Debug, Clone)]
pub struct WaveTiming {
    /// Per stream.
    pub streams: Vec<StreamTiming>,
    /// From the first request to the last stream's end.
    pub wall: Duration,
}

impl WaveTiming {
    /// Tokens of all streams per second of the wave's wall time, prompts included in the time.
    pub fn throughput(&self) -> f64 {
        self.tokens() as f64 / self.wall.as_secs_f64()
    }

    /// Tokens of all streams.
    pub fn tokens(&self) -> usize {
        self.streams.iter().map(|stream| stream.tokens).sum()
    }

    /// Tokens per second of all streams together while all of them decode: from the last first token to the first end.
    pub fn decode_rate(&self) -> f64 {
        let rate = |s: &StreamTiming| {
            (s.tokens.saturating_sub(1)) as f64 / s.gaps.iter().sum::<Duration>().as_secs_f64()
        };
        self.streams.iter().map(rate).sum()
    }
}

/// Runs a wave.
///
/// # Errors
/// The first status that any stream ended with, or a stream that gave fewer tokens than asked.
pub async fn run(client: &InferenceClient<Channel>, wave: &Wave) -> Result<WaveTiming, tonic::Status> {
    let start = Instant::now();
    let tasks: Vec<_> = (0..wave.streams)
        .map(|index| tokio::spawn(stream(client.clone(), request(wave, index as u64))))
        .collect();
    let mut streams = Vec::with_capacity(tasks.len());
    for task in tasks {
        streams.push(task.await.map_err(|error| tonic::Status::internal(error.to_string()))??);
    }
    Ok(WaveTiming { streams, wall: start.elapsed() })
}

/// A prompt of `len` tokens below `vocab_size`: another for every number, the same in every run.
pub fn prompt(number: u64, len: usize, vocab_size: u32) -> Vec<u32> {
    // SplitMix64 (Steele et al. 2014).
    let mut state = number;
    let mut draw = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % u64::from(vocab_size)) as u32
    };
    (0..len).map(|_| draw()).collect()
}

fn request(wave: &Wave, index: u64) -> GenerateRequest {
    let number = wave.salt.wrapping_mul(1 << 20).wrapping_add(index);
    let ids = prompt(number, wave.prompt_tokens, wave.vocab_size);
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids })),
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(wave.max_tokens),
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        output: Some(OutputOptions { token_ids_only: true, include_special_tokens: false }),
        ..GenerateRequest::default()
    }
}

async fn stream(
    mut client: InferenceClient<Channel>,
    request: GenerateRequest,
) -> Result<StreamTiming, tonic::Status> {
    let asked = request.sampling.as_ref().and_then(|s| s.max_tokens).unwrap_or(0) as usize;
    let start = Instant::now();
    let mut messages = client.generate(request).await?.into_inner();
    let (mut ttft, mut last, mut gaps, mut tokens) = (None, start, Vec::new(), 0);
    while let Some(message) = messages.message().await? {
        let now = Instant::now();
        if !message.token_ids.is_empty() {
            match ttft {
                None => ttft = Some(now - start),
                Some(_) => gaps.push(now - last),
            }
            last = now;
            tokens += message.token_ids.len();
        }
        if message.finish_reason() == FinishReason::Abort {
            return Err(tonic::Status::aborted("someone aborted a stream of the benchmark"));
        }
    }
    match ttft {
        Some(ttft) if tokens == asked => Ok(StreamTiming { ttft, gaps, tokens, total: start.elapsed() }),
        _ => Err(tonic::Status::data_loss(format!("a stream gave {tokens} tokens instead of {asked}"))),
    }
}
