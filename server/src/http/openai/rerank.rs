//! `/v1/rerank`, as Cohere, Jina and vLLM have it: documents by how well they answer a query.

use axum::response::Response;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::score::{ScoreOptions, check_count, scores, usage};
use crate::http::{ApiError, App, Call, fields::part, json_response};

/// What the engine's errors call otherwise.
const NAMES: [(&str, &str); 4] =
    [("document", "documents"), ("prompt", "documents"), ("prompt.text", "documents"), ("tenant", "user")];

/// Documents to be ranked.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct RerankFields {
    /// What is asked.
    pub query: String,
    /// What may answer it.
    pub documents: Vec<Document>,
    /// So many of the best; absent or 0: all.
    pub top_n: Option<usize>,
    /// False leaves the documents out of the answer.
    pub return_documents: Option<bool>,
    /// Not supported: `truncate_prompt_tokens` counts query and document together.
    pub max_tokens_per_doc: Option<u32>,
}

/// A document.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Document {
    /// Its text.
    Text(String),
    /// The same in an object.
    Object {
        /// Its text.
        text: String,
    },
}

impl Document {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { text } => text,
        }
    }
}

/// Ranks documents.
pub async fn create(app: App, call: &mut Call) -> Result<Response, ApiError> {
    answer(app, call).await.map_err(|error| error.renamed(&NAMES))
}

async fn answer(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let body: Value = call.json().await?;
    let (fields, options): (RerankFields, ScoreOptions) = (part(&body)?, part(&body)?);
    check_count("documents", fields.documents.len())?;
    if fields.max_tokens_per_doc.is_some() {
        let message =
            "is not supported; use truncate_prompt_tokens, which counts query and document together";
        return Err(ApiError::invalid("max_tokens_per_doc", message));
    }
    let card = app.model_named(options.model.as_deref()).await?;
    let documents: Vec<String> = fields.documents.into_iter().map(Document::into_text).collect();
    let pairs = documents.iter().map(|document| (fields.query.clone(), document.clone())).collect();
    let scores = scores(&app, call, options, pairs).await?;
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // Stable: of equals, the first comes first.
    order.sort_by(|&a, &b| scores[b].value.total_cmp(&scores[a].value));
    order.truncate(fields.top_n.filter(|&top| top > 0).unwrap_or(usize::MAX));
    let with_documents = fields.return_documents.unwrap_or(true);
    let result = |index: usize| {
        let mut result = json!({"index": index, "relevance_score": scores[index].value});
        if with_documents {
            result["document"] = json!({"text": documents[index]});
        }
        result
    };
    Ok(json_response(&json!({
        "id": call.id.as_str(),
        "model": card.served_model_name,
        "results": order.into_iter().map(result).collect::<Vec<Value>>(),
        "usage": usage(&scores),
    })))
}
