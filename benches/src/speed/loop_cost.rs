//! What the engine's loop adds to the kernels: the same decode steps through engine, scheduler and runner.

use std::{sync::Arc, time::Instant};

use tidemill_engine::{
    EmbeddingInfo, Engine, EngineOptions, ModelInfo, Pooling,
    ids::TokenId,
    model::{
        decoder::Decoder,
        files::{ModelFiles, ModelSource},
        generation_config::GenerationDefaults,
        spec::ModelSpec,
    },
    request::{GenerateRequest, Prompt},
    runner::{DecoderRunner, RunnerThread},
    sampling::SamplingParams,
    text::TextModel,
};
use tidemill_kernels::Ops;

use super::{Error, steps::BLOCK_SIZE};
use crate::summary::median;

/// What an engine is made of.
pub struct Setup<O: Ops> {
    /// The model, warm.
    pub decoder: Decoder<O>,
    /// V.
    pub vocab: usize,
    /// Blocks of its KV cache that may be used.
    pub layout_blocks: usize,
    /// Tokens of each prompt.
    pub context: usize,
    /// Steps that are measured.
    pub steps: usize,
    /// T of the largest step.
    pub max_tokens: usize,
    /// Sequences that decode together.
    pub batches: Vec<usize>,
}

/// Tokens that each request generates: enough for the first to be still decoding when the last one has been measured. The
/// prompts of 256 requests of 1k tokens take 32 steps of 8192 tokens.
pub fn tokens(steps: usize) -> usize {
    2 * steps
}

/// For each batch the seconds of a decode step, as a client of the engine sees it: the median time between two tokens of the last
/// request that began, while all others decode.
///
/// # Errors
/// What the engine returned.
pub fn measure<O: Ops + 'static>(setup: Setup<O>) -> Result<Vec<f64>, Error> {
    let Setup { decoder, vocab, layout_blocks, context, steps, max_tokens, batches } = setup;
    let (runner, ()) = RunnerThread::start(move || Ok((DecoderRunner::new(decoder, BLOCK_SIZE), ())))?;
    // Text is not part of the measurement: any tokenizer does.
    let files = ModelFiles::open(&ModelSource::Builtin)?;
    let text = Arc::new(TextModel::load(&files, &ModelSpec::load(&files)?)?);
    let info = ModelInfo {
        served_model_name: "random".into(),
        architecture: "random".into(),
        num_parameters: 0,
        weight_bytes_per_step: 0,
        vocab_size: vocab,
        max_model_len: context + tokens(steps),
        device: String::new(),
        dtype: "bfloat16",
        kv_cache_dtype: "bfloat16",
        block_size: BLOCK_SIZE,
        num_kv_blocks: layout_blocks,
        max_num_seqs: batches.iter().copied().max().unwrap_or(1),
        max_num_batched_tokens: max_tokens,
        eos_token_ids: Vec::new(),
        has_chat_template: false,
        defaults: GenerationDefaults::default(),
        is_bidirectional: false,
        embedding: EmbeddingInfo {
            dimensions: 1,
            pooling: Pooling::Last,
            normalize: false,
            is_only_output: false,
        },
        scoring: None,
    };
    let options = EngineOptions { look_ahead: true, ..EngineOptions::default() };
    let engine = Engine::with_runner(runner, info, text, options)?;
    batches.into_iter().map(|rows| decode_step(&engine, rows, context, steps, vocab)).collect()
}

fn decode_step(
    engine: &Engine,
    rows: usize,
    context: usize,
    steps: usize,
    vocab: usize,
) -> Result<f64, Error> {
    let handle = engine.handle();
    let mut generations = Vec::new();
    for row in 0..rows {
        let ids = (0..context).map(|i| TokenId(((i * 7919 + row * 104_729) % vocab) as u32)).collect();
        let sampling = SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(tokens(steps) as u32),
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let request =
            GenerateRequest { sampling, token_ids_only: true, ..GenerateRequest::new(Prompt::TokenIds(ids)) };
        generations.push(handle.submit(handle.validate(request)?)?);
    }
    let last = generations.last_mut().ok_or("a batch has at least one row")?;
    let (mut times, mut before) = (Vec::new(), None);
    while times.len() < steps {
        let output = last.next_blocking().ok_or("a generation ended early")??;
        let now = Instant::now();
        if let Some(before) = before.replace(now) {
            // Several tokens at once when this thread was late.
            let each = (now - before).as_secs_f64() / output.token_ids.len().max(1) as f64;
            times.extend(std::iter::repeat_n(each, output.token_ids.len()));
        }
    }
    Ok(median(&times))
}
