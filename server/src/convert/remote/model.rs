//! What is loaded, from the wire.

use tidemill_engine::{AdapterInfo, ids::TokenId};
use tidemill_proto::v1;

use crate::{
    client::{CallError, ModelCard, TokenBytes},
    clock::since_1970,
    http::answer::parsers::ParserChoice,
};

/// What a front end needs to know of a model; `vocabulary` holds the bytes of its tokens.
///
/// # Errors
/// When the engine reads answers in a way that is not known here.
pub fn model_card(model: v1::GetModelResponse, vocabulary: Vec<Vec<u8>>) -> Result<ModelCard, CallError> {
    let v1::GetModelResponse {
        served_model_name,
        architecture: _,
        num_parameters: _,
        vocab_size,
        max_model_len,
        device: _,
        dtype: _,
        kv_cache_dtype: _,
        block_size,
        num_kv_blocks,
        max_num_seqs: _,
        max_num_batched_tokens: _,
        eos_token_ids: _,
        has_chat_template,
        default_sampling: _,
        version: _,
        weight_bytes_per_step: _,
        embedding: _,
        special_tokens,
        tool_call_parser,
        reasoning_parser,
        adapters: _,
        scoring: _,
        tokenizer,
    } = model;
    Ok(ModelCard {
        served_model_name,
        max_model_len: max_model_len as usize,
        vocab_size: vocab_size as usize,
        has_chat_template,
        has_tokenizer: !tokenizer.is_empty(),
        block_size: block_size as usize,
        num_kv_blocks: num_kv_blocks as usize,
        tokens: TokenBytes::Table(vocabulary.into()),
        special_tokens: special_tokens.into_iter().map(|token| (TokenId(token.id), token.text)).collect(),
        tool_format: format("tool_call_parser", &tool_call_parser)?,
        reasoning: format("reasoning_parser", &reasoning_parser)?,
        created: since_1970().as_secs(),
    })
}

/// The adapters that an engine has.
pub fn adapters(adapters: Vec<v1::Adapter>) -> Vec<AdapterInfo> {
    adapters.into_iter().map(|v1::Adapter { name, path }| AdapterInfo { name, path }).collect()
}

/// A format by its name in flags; an empty one is none.
fn format<F: Copy>(field: &str, name: &str) -> Result<Option<F>, CallError>
where
    ParserChoice<F>: std::str::FromStr,
{
    if name.is_empty() {
        return Ok(None);
    }
    match name.parse() {
        Ok(ParserChoice::Fixed(format)) => Ok(Some(format)),
        _ => Err(CallError::internal(&format!(
            "the engine's {field} is {name:?}, which this gateway does not know; run the same version of both"
        ))),
    }
}
