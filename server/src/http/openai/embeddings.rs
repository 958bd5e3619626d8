//! `/v1/embeddings`.

use axum::response::Response;
use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::{StreamExt, TryStreamExt, stream};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemill_engine::{
    ids::{RequestId, TenantId, TokenId},
    output::Embedding,
    request::{EmbedRequest, GenerateRequest, Prompt},
};

use crate::http::{ApiError, App, Call, fields::part, json_response};

/// Most inputs of a request, as OpenAI has it.
pub(super) const MAX_INPUTS: usize = 2048;
/// Inputs of one request that are under way at once. The engine puts them into common batches.
pub(super) const AT_ONCE: usize = 32;
/// What the engine's errors call otherwise.
const NAMES: [(&str, &str); 4] =
    [("prompt.text", "input"), ("prompt.token_ids", "input"), ("prompt", "input"), ("tenant", "user")];

/// What is to be embedded.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct EmbeddingFields {
    /// The model's name; absent for whatever is served.
    pub model: Option<String>,
    /// A text, token ids, or several of either.
    pub input: InputField,
    /// Numbers, or their bytes in base64: 32-bit floating point, little-endian.
    pub encoding_format: Option<EncodingFormat>,
    /// So many of the first values, for models that were trained for that.
    pub dimensions: Option<u32>,
    /// False leaves the length as it is, true makes it 1; absent: as the model folder says.
    pub normalize: Option<bool>,
    /// Which of the model's prompts is put before each text, such as `query`; absent: the model's default; empty: none.
    pub prompt_name: Option<String>,
    /// Leaves the ends of inputs out that have more tokens; -1: than the model takes. Absent: what is too long is refused.
    pub truncate_prompt_tokens: Option<i32>,
    /// Who is served: the tenant of fair scheduling.
    pub user: Option<String>,
    /// With --scheduling-policy priority: lower is served first.
    pub priority: Option<i32>,
    /// Only requests with the same salt share cached prefixes.
    pub cache_salt: Option<String>,
    /// The request's name for /abort and logs.
    pub request_id: Option<String>,
}

/// One input or several.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum InputField {
    /// A text.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
    /// Texts.
    Texts(Vec<String>),
    /// Lists of token ids.
    IdLists(Vec<Vec<u32>>),
}

/// How values are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EncodingFormat {
    /// Numbers.
    Float,
    /// Their bytes.
    Base64,
}

impl InputField {
    /// Each input by itself.
    fn prompts(self) -> Result<Vec<Prompt>, ApiError> {
        let ids = |ids: Vec<u32>| Prompt::TokenIds(ids.into_iter().map(TokenId).collect());
        let prompts: Vec<Prompt> = match self {
            Self::Text(text) => vec![Prompt::Text(text)],
            Self::Ids(list) if list.is_empty() => Vec::new(),
            Self::Ids(list) => vec![ids(list)],
            Self::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Self::IdLists(lists) => lists.into_iter().map(ids).collect(),
        };
        match prompts.len() {
            0 => Err(ApiError::invalid("input", "is empty; give at least one text")),
            count if count > MAX_INPUTS => {
                let message = format!("has {count} inputs; at most {MAX_INPUTS} are accepted");
                Err(ApiError::invalid("input", message))
            }
            _ => Ok(prompts),
        }
    }
}

/// Embeds one text or several.
pub async fn create(app: App, call: &mut Call) -> Result<Response, ApiError> {
    embed(app, call).await.map_err(|error| error.renamed(&NAMES))
}

async fn embed(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let fields: EmbeddingFields = part(&call.json::<Value>().await?)?;
    let card = app.model_named(fields.model.as_deref()).await?;
    let prompts = fields.input.prompts()?;
    let like = stamped(call, fields.user, fields.request_id)?;
    let several = prompts.len() > 1;
    // Who drops the group ends its members, and an abort by its name finds them.
    let _group = app.groups.enter(&call.id, prompts.len());
    let pending = prompts.into_iter().enumerate().map(|(at, prompt)| {
        let id = if several { RequestId::new(format!("{}-{at}", call.id)) } else { call.id.clone() };
        app.engine.embed(EmbedRequest {
            id: Some(id),
            model: fields.model.clone(),
            priority: fields.priority.unwrap_or(0),
            tenant: like.tenant.clone(),
            credential: like.credential.clone(),
            cache_salt: fields.cache_salt.clone().unwrap_or_default(),
            trace_parent: like.trace_parent.clone(),
            dimensions: fields.dimensions,
            normalize: fields.normalize,
            prompt_name: fields.prompt_name.clone(),
            truncate_prompt_tokens: fields.truncate_prompt_tokens,
            ..EmbedRequest::new(prompt)
        })
    });
    let embeddings: Vec<Embedding> = stream::iter(pending).buffered(AT_ONCE).try_collect().await?;
    let tokens: usize = embeddings.iter().map(|embedding| embedding.prompt_tokens).sum();
    let format = fields.encoding_format.unwrap_or(EncodingFormat::Float);
    Ok(json_response(&Answer {
        object: "list",
        data: embeddings.iter().enumerate().map(|(index, one)| Datum::of(index, one, format)).collect(),
        model: &card.served_model_name,
        usage: json!({"prompt_tokens": tokens, "total_tokens": tokens}),
    }))
}

/// What the headers say, by way of a request that knows how to take it.
pub(super) fn stamped(
    call: &mut Call,
    user: Option<String>,
    request_id: Option<String>,
) -> Result<GenerateRequest, ApiError> {
    let mut like = GenerateRequest::new(Prompt::Text(String::new()));
    like.tenant = TenantId::new(user.unwrap_or_default());
    call.stamp(&mut like, request_id)?;
    Ok(like)
}

#[derive(Serialize)]
struct Answer<'a> {
    object: &'static str,
    data: Vec<Datum<'a>>,
    model: &'a str,
    usage: Value,
}

#[derive(Serialize)]
struct Datum<'a> {
    object: &'static str,
    index: usize,
    embedding: Values<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Values<'a> {
    Float(&'a [f32]),
    Base64(String),
}

impl<'a> Datum<'a> {
    fn of(index: usize, embedding: &'a Embedding, format: EncodingFormat) -> Self {
        let values = match format {
            EncodingFormat::Float => Values::Float(&embedding.values),
            EncodingFormat::Base64 => {
                let bytes: Vec<u8> = embedding.values.iter().flat_map(|value| value.to_le_bytes()).collect();
                Values::Base64(BASE64_STANDARD.encode(bytes))
            }
        };
        Self { object: "embedding", index, embedding: values }
    }
}
