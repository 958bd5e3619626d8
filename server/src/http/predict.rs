//! `/predict`: what model servers offer. JSON in; raw text as it is generated, or one JSON.

use axum::response::Response;
use futures_util::stream;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tidemill_engine::{
    request::{GenerateRequest, Prompt},
    text::chat::ChatPrompt,
};

use super::{
    ApiError, App, Call,
    answer::{
        Answer,
        asking::{self, Tools},
        parsers::Piece,
    },
    fields::{SamplingFields, part},
    json_response,
    openai::chat::{MessageField, conversation},
    sse,
};

/// What is of predictions alone. One of `prompt` and `messages`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(default)]
#[derive(Default)]
pub struct PredictFields {
    /// The model's name; absent for whatever is served.
    pub model: Option<String>,
    /// A text that goes on.
    pub prompt: Option<String>,
    /// The same, as some clients call it.
    pub inputs: Option<String>,
    /// A conversation that is answered.
    pub messages: Option<Vec<MessageField>>,
    /// Raw text as it is generated instead of one JSON.
    pub stream: Option<bool>,
    /// Sampling fields may stand here as well.
    pub parameters: Option<Map<String, Value>>,
}

/// Answers a prompt or a conversation.
pub async fn predict(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let mut body: Value = call.json().await?;
    let fields: PredictFields = part(&body)?;
    if let (Some(body), Some(parameters)) = (body.as_object_mut(), fields.parameters) {
        body.extend(parameters);
    }
    let mut sampling: SamplingFields = part(&body)?;
    let card = app.model_named(fields.model.as_deref()).await?;
    let prompt = match (fields.prompt.or(fields.inputs), fields.messages) {
        (Some(text), None) => Prompt::Text(text),
        (None, Some(messages)) => Prompt::Chat(ChatPrompt::new(conversation(&messages)?)),
        _ => return Err(ApiError::invalid("prompt", "give one of `prompt` and `messages`")),
    };
    sampling.check_single("/v1/completions")?;
    let request_id = sampling.request_id.take();
    let is_chat = matches!(prompt, Prompt::Chat(_));
    let mut request = GenerateRequest::new(prompt);
    sampling.apply(&mut request)?;
    request.model = fields.model;
    call.stamp(&mut request, request_id)?;
    let ask = match is_chat {
        true => asking::ask(&card, request, Tools::default(), None)?,
        false => super::answer::Ask { request, parser: None, single_tool_call: false },
    };
    let answer = Answer::start(&app.engine, ask).await?;
    if fields.stream.unwrap_or(false) {
        return Ok(raw(answer));
    }
    whole(&card.served_model_name, answer).await
}

/// The text as it is generated. A failure after the first byte can only be told by breaking the response off.
fn raw(answer: Answer) -> Response {
    sse::broken_off(
        "text/plain; charset=utf-8",
        stream::unfold(Some(answer), |answer| async {
            let mut answer = answer?;
            match answer.next().await? {
                Ok(step) => Some((Ok(text(step.pieces).into_bytes()), Some(answer))),
                Err(error) => Some((Err(error), None)),
            }
        }),
    )
}

async fn whole(model: &str, mut answer: Answer) -> Result<Response, ApiError> {
    let (mut output, mut reason, mut usage) = (String::new(), "stop", Default::default());
    let id = answer.id.clone();
    while let Some(step) = answer.next().await {
        let step = step?;
        output.push_str(&text(step.pieces));
        if let Some((end, used)) = step.end {
            (reason, usage) = (end.openai(), used);
        }
    }
    let (prompt_tokens, completion_tokens) = (usage.prompt_tokens, usage.completion_tokens);
    Ok(json_response(&json!({
        "request_id": id.as_str(),
        "model": model,
        "output": output,
        "finish_reason": reason,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    })))
}

/// The text without thoughts.
fn text(pieces: Vec<Piece>) -> String {
    let text = |piece| if let Piece::Text(text) = piece { Some(text) } else { None };
    pieces.into_iter().filter_map(text).collect()
}
