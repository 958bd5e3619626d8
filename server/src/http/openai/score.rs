//! `/v1/score`, as vLLM has it: how well texts answer queries.

use axum::response::Response;
use futures_util::{StreamExt, TryStreamExt, stream};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tidemill_engine::{
    ids::RequestId,
    output::Score,
    request::{ScoreInput, ScoreRequest},
};

use super::embeddings::{AT_ONCE, MAX_INPUTS, stamped};
use crate::http::{
    ApiError, App, Call,
    fields::{OneOrMany, part},
    json_response,
};

/// What the engine's errors call otherwise.
const NAMES: [(&str, &str); 5] = [
    ("query", "text_1"),
    ("document", "text_2"),
    ("prompt", "text_2"),
    ("prompt.text", "text_2"),
    ("tenant", "user"),
];

/// Pairs to be scored.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ScoreFields {
    /// One query, or one for each text of `text_2`.
    #[serde(alias = "queries")]
    pub text_1: OneOrMany<String>,
    /// Texts that may answer.
    #[serde(alias = "documents")]
    pub text_2: OneOrMany<String>,
}

/// How pairs are scored, whichever way they are asked for.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ScoreOptions {
    /// The model's name; absent for whatever is served.
    pub model: Option<String>,
    /// What makes a document right, for models that are told.
    pub instruction: Option<String>,
    /// False gives what the model's head gives, before the function that makes scores of it.
    pub use_activation: Option<bool>,
    /// Leaves the ends of texts out where a pair has more tokens; -1: than the model takes. Absent: what is too long is refused.
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

/// Scores pairs of texts.
pub async fn create(app: App, call: &mut Call) -> Result<Response, ApiError> {
    answer(app, call).await.map_err(|error| error.renamed(&NAMES))
}

async fn answer(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let body: Value = call.json().await?;
    let (ScoreFields { text_1, text_2 }, options): (_, ScoreOptions) = (part(&body)?, part(&body)?);
    let pairs = pairs(text_1.into_vec(), text_2.into_vec())?;
    let card = app.model_named(options.model.as_deref()).await?;
    let scores = scores(&app, call, options, pairs).await?;
    let data = scores.iter().enumerate();
    let data = data.map(|(index, score)| json!({"index": index, "object": "score", "score": score.value}));
    Ok(json_response(&json!({
        "id": call.id.as_str(),
        "object": "list",
        "created": crate::clock::since_1970().as_secs(),
        "model": card.served_model_name,
        "data": data.collect::<Vec<Value>>(),
        "usage": usage(&scores),
    })))
}

/// One query for all texts, or one for each.
fn pairs(queries: Vec<String>, texts: Vec<String>) -> Result<Vec<(String, String)>, ApiError> {
    check_count("text_1", queries.len())?;
    check_count("text_2", texts.len())?;
    match (&queries[..], texts.len()) {
        ([query], _) => Ok(texts.into_iter().map(|text| (query.clone(), text)).collect()),
        (queries, count) if queries.len() == count => Ok(queries.iter().cloned().zip(texts).collect()),
        (queries, count) => {
            let message =
                format!("has {} texts for {count} of text_2; give one, or one for each", queries.len());
            Err(ApiError::invalid("text_1", message))
        }
    }
}

/// # Errors
/// 400 for no text, and for too many.
pub(super) fn check_count(field: &'static str, count: usize) -> Result<(), ApiError> {
    match count {
        0 => Err(ApiError::invalid(field, "is empty; give at least one text")),
        1..=MAX_INPUTS => Ok(()),
        _ => Err(ApiError::invalid(field, format!("has {count} texts; at most {MAX_INPUTS} are accepted"))),
    }
}

/// The scores of all pairs, in order. Dropping the future aborts what is under way.
///
/// # Errors
/// The first that comes.
pub(super) async fn scores(
    app: &App,
    call: &mut Call,
    options: ScoreOptions,
    pairs: Vec<(String, String)>,
) -> Result<Vec<Score>, ApiError> {
    let like = stamped(call, options.user, options.request_id)?;
    let several = pairs.len() > 1;
    // Who drops the group ends its members, and an abort by its name finds them.
    let _group = app.groups.enter(&call.id, pairs.len());
    let pending = pairs.into_iter().enumerate().map(|(at, (query, document))| {
        let id = if several { RequestId::new(format!("{}-{at}", call.id)) } else { call.id.clone() };
        app.engine.score(ScoreRequest {
            id: Some(id),
            instruction: options.instruction.clone(),
            model: options.model.clone(),
            priority: options.priority.unwrap_or(0),
            tenant: like.tenant.clone(),
            credential: like.credential.clone(),
            cache_salt: options.cache_salt.clone().unwrap_or_default(),
            trace_parent: like.trace_parent.clone(),
            truncate_prompt_tokens: options.truncate_prompt_tokens,
            use_activation: options.use_activation,
            ..ScoreRequest::new(ScoreInput::Pair { query, document })
        })
    });
    Ok(stream::iter(pending).buffered(AT_ONCE).try_collect().await?)
}

/// Tokens of all pairs.
pub(super) fn usage(scores: &[Score]) -> Value {
    let tokens: usize = scores.iter().map(|score| score.prompt_tokens).sum();
    json!({"prompt_tokens": tokens, "total_tokens": tokens})
}
