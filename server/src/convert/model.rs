//! What is loaded, for the wire.

use tidemill_engine::{AdapterInfo, ModelInfo, text::TextModel};
use tidemill_proto::v1;

use crate::http::answer::parsers::{ReasoningFormat, ToolFormat};

/// A loaded model, its limits, its special tokens, and how it writes tool calls and thoughts.
pub fn model_response(
    info: &ModelInfo,
    text: &TextModel,
    (tools, reasoning): (Option<ToolFormat>, Option<ReasoningFormat>),
) -> v1::GetModelResponse {
    let defaults = &info.defaults;
    let embeds = info.scoring.is_none_or(|scoring| !scoring.is_only_output);
    v1::GetModelResponse {
        served_model_name: info.served_model_name.clone(),
        architecture: info.architecture.clone(),
        num_parameters: info.num_parameters,
        vocab_size: info.vocab_size as u32,
        max_model_len: info.max_model_len as u32,
        device: info.device.clone(),
        dtype: info.dtype.to_owned(),
        kv_cache_dtype: info.kv_cache_dtype.to_owned(),
        block_size: info.block_size as u32,
        num_kv_blocks: info.num_kv_blocks as u32,
        max_num_seqs: info.max_num_seqs as u32,
        max_num_batched_tokens: info.max_num_batched_tokens as u32,
        eos_token_ids: info.eos_token_ids.iter().map(|id| id.0).collect(),
        has_chat_template: info.has_chat_template,
        default_sampling: Some(v1::SamplingParams {
            temperature: defaults.temperature,
            top_k: defaults.top_k,
            top_p: defaults.top_p,
            min_p: defaults.min_p,
            repetition_penalty: defaults.repetition_penalty,
            max_tokens: defaults.max_new_tokens,
            ..v1::SamplingParams::default()
        }),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        weight_bytes_per_step: info.weight_bytes_per_step,
        embedding: embeds.then(|| v1::EmbeddingInfo {
            dimensions: info.embedding.dimensions as u32,
            pooling: info.embedding.pooling.name().to_owned(),
            normalize: info.embedding.normalize,
            is_only_output: info.embedding.is_only_output,
        }),
        scoring: info.scoring.map(|scoring| v1::ScoringInfo {
            format: scoring.format.name().to_owned(),
            is_only_output: scoring.is_only_output,
        }),
        special_tokens: text
            .special_tokens()
            .into_iter()
            .map(|(id, text)| v1::SpecialToken { id: id.0, text })
            .collect(),
        tool_call_parser: tools.map(|format| format.to_string()).unwrap_or_default(),
        reasoning_parser: reasoning.map(|format| format.to_string()).unwrap_or_default(),
        tokenizer: text.tokenizer_kind().map(|kind| kind.to_string()).unwrap_or_default(),
        adapters: Vec::new(),
    }
}

/// The adapters that requests can name.
pub fn adapter_messages(adapters: Vec<AdapterInfo>) -> Vec<v1::Adapter> {
    adapters.into_iter().map(|AdapterInfo { name, path }| v1::Adapter { name, path }).collect()
}
