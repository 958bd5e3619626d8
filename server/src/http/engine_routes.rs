//! `/tokenize`, `/detokenize`, `/abort`: the engine's own.

use axum::response::Response;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tidemill_engine::{
    ids::{RequestId, TokenId},
    output::{AbortReceipt, AbortStage},
    text::chat::ChatPrompt,
};

use super::{
    ApiError, App, Call, json_response,
    openai::chat::{MessageField, conversation},
};
use crate::client::TokenizeInput;

/// One of `prompt` and `messages`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct TokenizeRequest {
    /// The model's name; absent for whatever is served.
    #[serde(default)]
    pub model: Option<String>,
    /// A text.
    #[serde(default)]
    pub prompt: Option<String>,
    /// A conversation; the chat template renders it.
    #[serde(default)]
    pub messages: Option<Vec<MessageField>>,
    /// False leaves the tokenizer's own special tokens out of a text.
    #[serde(default)]
    pub add_special_tokens: Option<bool>,
    /// False ends a conversation without the start of an answer.
    #[serde(default)]
    pub add_generation_prompt: Option<bool>,
    /// A conversation ends within its last message, right after its content.
    #[serde(default)]
    pub continue_final_message: Option<bool>,
    /// Tools of a conversation, in OpenAI's form.
    #[serde(default)]
    pub tools: Option<Vec<Value>>,
    /// More variables for the chat template.
    #[serde(default)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Adds the texts of the tokens.
    #[serde(default)]
    pub return_token_strs: Option<bool>,
}

/// Text as token ids.
pub async fn tokenize(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let request: TokenizeRequest = call.json().await?;
    let input = match (request.prompt, request.messages) {
        (Some(text), None) => TokenizeInput::Text(text, request.add_special_tokens.unwrap_or(true)),
        (None, Some(messages)) => TokenizeInput::Chat(ChatPrompt {
            tools: request.tools.map(Value::Array),
            add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
            continue_final_message: request.continue_final_message.unwrap_or(false),
            template_kwargs: request.chat_template_kwargs.unwrap_or_default(),
            messages: conversation(&messages)?,
        }),
        _ => return Err(ApiError::invalid("prompt", "give one of `prompt` and `messages`")),
    };
    let card = app.model_named(request.model.as_deref()).await?;
    let tokenized = app.engine.tokenize(input).await?;
    let texts = request.return_token_strs.unwrap_or(false).then(|| {
        let text = |id: &TokenId| String::from_utf8_lossy(card.tokens.bytes(*id)).into_owned();
        tokenized.ids.iter().map(text).collect::<Vec<_>>()
    });
    Ok(json_response(&json!({
        "tokens": tokenized.ids.iter().map(|id| id.0).collect::<Vec<_>>(),
        "count": tokenized.ids.len(),
        "max_model_len": card.max_model_len,
        "token_strs": texts,
    })))
}

/// Token ids.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct DetokenizeRequest {
    /// The model's name; absent for whatever is served.
    #[serde(default)]
    pub model: Option<String>,
    /// The ids.
    pub tokens: Vec<u32>,
    /// True leaves special tokens out.
    #[serde(default)]
    pub skip_special_tokens: Option<bool>,
}

/// Token ids as text.
pub async fn detokenize(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let request: DetokenizeRequest = call.json().await?;
    app.model_named(request.model.as_deref()).await?;
    let ids = request.tokens.into_iter().map(TokenId).collect();
    let text = app.engine.detokenize(ids, request.skip_special_tokens != Some(true)).await?;
    Ok(json_response(&json!({ "prompt": text })))
}

/// Which request to end.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct AbortRequest {
    /// Its `x-request-id`, the `request_id` that it was sent with, or the `id` of its answer.
    pub request_id: String,
}

/// Prefixes that answers put before a request's name.
const PREFIXES: [&str; 4] = ["chatcmpl-", "cmpl-", "msg_", "resp_"];

/// Ends a request at any stage. Unknown and finished ones are answers too.
pub async fn abort(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let request: AbortRequest = call.json().await?;
    let asked = request.request_id.as_str();
    if asked.is_empty() || asked.len() > RequestId::MAX_BYTES {
        let message = format!("must have 1 to {} bytes", RequestId::MAX_BYTES);
        return Err(ApiError::invalid("request_id", message));
    }
    let mut receipts = receipts(&app, asked).await?;
    let unknown =
        |receipts: &[AbortReceipt]| receipts.iter().all(|receipt| receipt.stage == AbortStage::Unknown);
    if unknown(&receipts)
        && let Some(name) = PREFIXES.iter().find_map(|prefix| asked.strip_prefix(prefix))
    {
        receipts = self::receipts(&app, name).await?;
    }
    // Several prompts are one request here: the furthest of them says where it was.
    let Some(furthest) = receipts.iter().max_by_key(|receipt| progress(receipt.stage)) else {
        return Err(ApiError::not_found("no such request"));
    };
    let sum = |count: fn(&AbortReceipt) -> usize| receipts.iter().map(count).sum::<usize>();
    let slowest = receipts.iter().map(|receipt| receipt.time_to_free).max().unwrap_or_default();
    Ok(json_response(&json!({
        "request_id": asked,
        "stage": stage_name(furthest.stage),
        "completion_tokens": sum(|receipt| receipt.completion_tokens),
        "blocks_freed": sum(|receipt| receipt.blocks_freed),
        "rows_freed": sum(|receipt| receipt.rows_freed),
        "seconds_to_free": slowest.as_secs_f64(),
    })))
}

async fn receipts(app: &App, id: &str) -> Result<Vec<AbortReceipt>, ApiError> {
    let mut receipts = Vec::new();
    for member in app.groups.members(&RequestId::new(id)) {
        receipts.push(app.engine.abort(member).await?);
    }
    Ok(receipts)
}

fn progress(stage: AbortStage) -> u8 {
    match stage {
        AbortStage::Unknown => 0,
        AbortStage::Finished => 1,
        AbortStage::Queued => 2,
        AbortStage::Prefill => 3,
        AbortStage::Decode => 4,
    }
}

/// The stage's name in receipts.
pub fn stage_name(stage: AbortStage) -> &'static str {
    match stage {
        AbortStage::Unknown => "unknown",
        AbortStage::Queued => "queued",
        AbortStage::Prefill => "prefill",
        AbortStage::Decode => "decode",
        AbortStage::Finished => "finished",
    }
}
