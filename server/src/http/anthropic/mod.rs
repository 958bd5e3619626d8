//! Anthropic's API: `/v1/messages` and `/v1/messages/count_tokens`.
//!
//! The header `anthropic-version` is accepted and not needed: there is one version.

mod answer;
mod conversation;
mod fields;

use axum::response::Response;
use serde_json::{Map, Value, json};
use tidemill_engine::{
    ids::TenantId,
    request::{GenerateRequest, Prompt},
    structured::Structured,
    text::chat::ChatPrompt,
};

use self::{
    answer::MessageWriter,
    fields::{Display, ThinkingField},
};
use super::{
    ApiError, App, Call,
    answer::{Answer, Ask, asking},
    fields::{OneOrMany, SamplingFields, part},
    json_response,
};
use crate::client::{ModelCard, TokenizeInput};

pub use fields::{MessageFields, PromptFields};

/// What this family calls otherwise than the engine does.
const NAMES: [(&str, &str); 6] = [
    ("prompt.chat", "messages"),
    ("stop", "stop_sequences"),
    ("response_format", "output_config.format"),
    (".function.name", ".name"),
    (".function.parameters", ".input_schema"),
    ("user", "metadata.user_id"),
];

/// Answers a conversation.
pub async fn create(app: App, call: &mut Call) -> Result<Response, ApiError> {
    message(app, call).await.map_err(|error| error.renamed(&NAMES))
}

/// Counts the tokens that a conversation would have as a prompt.
pub async fn count_tokens(app: App, call: &mut Call) -> Result<Response, ApiError> {
    count(app, call).await.map_err(|error| error.renamed(&NAMES))
}

async fn message(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let body: Value = call.json().await?;
    let prompt: PromptFields = part(&body)?;
    let fields: MessageFields = part(&body)?;
    let mut sampling: SamplingFields = part(&body)?;
    sampling.check_single("/v1/chat/completions")?;
    fields.refuse_unsupported()?;
    let card = app.model_named(prompt.model.as_deref()).await?;
    let request_id = sampling.request_id.take();
    sampling.max_tokens = Some(fields.max_tokens);
    (sampling.max_completion_tokens, sampling.max_new_tokens) = (None, None);
    if let Some(stop) = fields.stop_sequences {
        if stop.iter().any(String::is_empty) {
            return Err(ApiError::invalid("stop_sequences", "must not contain an empty string"));
        }
        sampling.stop = Some(OneOrMany::Many(stop));
    }
    if let Some(user) = fields.metadata.and_then(|metadata| metadata.user_id) {
        sampling.user = Some(tenant(user));
    }
    if let Some(ThinkingField::Enabled { budget_tokens, .. }) = prompt.thinking
        && budget_tokens >= fields.max_tokens
    {
        let message = format!("is {budget_tokens}; it must be less than max_tokens, {}", fields.max_tokens);
        return Err(ApiError::invalid("thinking.budget_tokens", message));
    }
    let display = prompt.thinking.map_or(Display::Summarized, ThinkingField::display);
    let mut request = prepared(&prompt)?;
    let form = request.structured.take();
    sampling.apply(&mut request)?;
    if form.is_some() && request.structured.is_some() {
        return Err(ApiError::invalid("output_config.format", "the answer can have one form only"));
    }
    request.structured = form.or(request.structured);
    call.stamp(&mut request, request_id)?;
    let answer = Answer::start(&app.engine, ask(&card, request, prompt)?).await?;
    let writer = MessageWriter::new(answer, card, display);
    if fields.stream.unwrap_or(false) { Ok(writer.stream()) } else { writer.whole().await }
}

async fn count(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let prompt: PromptFields = part(&call.json::<Value>().await?)?;
    let card = app.model_named(prompt.model.as_deref()).await?;
    // The same way as for an answer: the tools stand in the prompt where the answer could call them.
    let request = prepared(&prompt)?;
    let Prompt::Chat(chat) = ask(&card, request, prompt)?.request.prompt else {
        unreachable!("a conversation stays one");
    };
    let tokenized = app.engine.tokenize(TokenizeInput::Chat(chat)).await?;
    Ok(json_response(&json!({ "input_tokens": tokenized.ids.len() })))
}

/// The conversation and what is asked of the answer's form, without how tokens are chosen.
fn prepared(prompt: &PromptFields) -> Result<GenerateRequest, ApiError> {
    prompt.refuse_unsupported()?;
    let mut template_kwargs = Map::new();
    if let Some(thinking) = prompt.thinking {
        let thinks = !matches!(thinking, ThinkingField::Disabled);
        template_kwargs.insert("enable_thinking".to_owned(), thinks.into());
    }
    if let Some(effort) = prompt.output_config.as_ref().and_then(|config| config.effort.as_deref()) {
        template_kwargs.insert("reasoning_effort".to_owned(), effort.into());
    }
    let (messages, continue_final_message) =
        conversation::conversation(prompt.system.as_ref(), &prompt.messages)?;
    let chat = ChatPrompt { template_kwargs, continue_final_message, ..ChatPrompt::new(messages) };
    let mut request = GenerateRequest::new(Prompt::Chat(chat));
    request.model = prompt.model.clone();
    if let Some(format) = prompt.format()? {
        if continue_final_message {
            return Err(ApiError::invalid(
                "output_config.format",
                "an answer of this form cannot begin with the last message's text; end the conversation with the user",
            ));
        }
        request.structured = Some(Structured::JsonSchema(format.to_string().into()));
    }
    Ok(request)
}

fn ask(card: &ModelCard, request: GenerateRequest, prompt: PromptFields) -> Result<Ask, ApiError> {
    let budget = match prompt.thinking {
        Some(ThinkingField::Enabled { budget_tokens, .. }) => Some(budget_tokens),
        // Not every template can tell its model not to think; no budget at all can.
        Some(ThinkingField::Disabled) => card.reasoning.is_some().then_some(0),
        Some(ThinkingField::Adaptive { .. }) | None => None,
    };
    asking::ask(card, request, fields::tools(prompt.tools, prompt.tool_choice)?, budget)
}

/// The tenant of a user's id; some clients send long ones.
fn tenant(user: String) -> String {
    let fits = user.len() <= TenantId::MAX_BYTES;
    if fits { user } else { blake3::hash(user.as_bytes()).to_hex().to_string() }
}
