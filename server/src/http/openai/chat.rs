//! `/v1/chat/completions`.

mod answer;
mod messages;

use axum::response::Response;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};
use tidemill_engine::{
    request::{GenerateRequest, Prompt, limits},
    text::chat::ChatPrompt,
};

use self::answer::ChatWriter;
use super::{
    StreamOptions, stream_options,
    tools::{ToolChoiceField, tools},
};
use crate::http::{
    ApiError, App, Call,
    answer::{Answer, Ask, asking},
    fields::{SamplingFields, part},
};

pub use messages::{MessageField, conversation};

/// What is of chats alone.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ChatFields {
    /// The model's name; absent for whatever is served.
    #[serde(default)]
    pub model: Option<String>,
    /// The conversation, oldest first.
    pub messages: Vec<MessageField>,
    /// Server-sent events instead of one answer.
    #[serde(default)]
    pub stream: Option<bool>,
    /// More about the stream.
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// Log-probabilities of the answer's tokens.
    #[serde(default)]
    pub logprobs: Option<bool>,
    /// And of so many alternatives, up to 20.
    #[serde(default)]
    pub top_logprobs: Option<u32>,
    /// Functions that the model may call.
    #[serde(default)]
    pub tools: Option<Vec<Value>>,
    /// Whether it does.
    #[serde(default)]
    pub tool_choice: Option<ToolChoiceField>,
    /// Whether it may call several.
    #[serde(default)]
    pub parallel_tool_calls: Option<bool>,
    /// none lets models that can do without thoughts do without; other words are for the template.
    #[serde(default)]
    pub reasoning_effort: Option<String>,
    /// False leaves thoughts out of the answer.
    #[serde(default)]
    pub include_reasoning: Option<bool>,
    /// Tokens that the model may think.
    #[serde(default)]
    pub thinking_token_budget: Option<u32>,
    /// More variables for the chat template.
    #[serde(default)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// False ends the prompt without the start of an answer.
    #[serde(default)]
    pub add_generation_prompt: Option<bool>,
    /// The answer goes on from the last message.
    #[serde(default)]
    pub continue_final_message: Option<bool>,
    /// Not supported: answers of chats are not kept.
    #[serde(default)]
    pub store: Option<bool>,
    /// Only `["text"]`.
    #[serde(default)]
    pub modalities: Option<Vec<String>>,
    /// Not supported: a client supplies no template.
    #[serde(default)]
    pub chat_template: Option<Value>,
    /// Replaced by `tools`.
    #[serde(default)]
    pub functions: Option<Value>,
    /// Replaced by `tool_choice`.
    #[serde(default)]
    pub function_call: Option<Value>,
}

impl ChatFields {
    /// What cannot be done, with what to do instead.
    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        let refuse = |unsupported: bool, field: &str, instead: &str| {
            if unsupported { Err(ApiError::invalid(field, instead)) } else { Ok(()) }
        };
        let other_modality = |list: &Vec<String>| list.iter().any(|modality| modality != "text");
        refuse(
            self.modalities.as_ref().is_some_and(other_modality),
            "modalities",
            "only text is generated here",
        )?;
        refuse(
            self.store == Some(true),
            "store",
            "answers of chats are not kept; use /v1/responses for that",
        )?;
        refuse(
            self.chat_template.is_some(),
            "chat_template",
            "a request cannot bring a template; start the server with --chat-template",
        )?;
        refuse(self.functions.is_some(), "functions", "is not supported; use `tools`")?;
        refuse(self.function_call.is_some(), "function_call", "is not supported; use `tool_choice`")?;
        refuse(
            self.top_logprobs.is_some() && self.logprobs != Some(true),
            "top_logprobs",
            "can only be given with `logprobs: true`",
        )?;
        refuse(
            self.top_logprobs.is_some_and(|top| top > limits::MAX_LOGPROBS),
            "top_logprobs",
            "must be 20 or less",
        )
    }
}

/// Answers a conversation.
pub async fn create(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let body: Value = call.json().await?;
    let chat: ChatFields = part(&body)?;
    let mut sampling: SamplingFields = part(&body)?;
    chat.refuse_unsupported()?;
    let stream = chat.stream.unwrap_or(false);
    let options = stream_options(stream, chat.stream_options)?;
    sampling.check_stream(stream)?;
    let card = app.model_named(chat.model.as_deref()).await?;
    let request_id = sampling.request_id.take();
    let mut request = GenerateRequest::new(Prompt::Chat(prompt(&chat)?));
    sampling.apply(&mut request)?;
    request.model = chat.model.clone();
    request.sampling.logprobs = (chat.logprobs == Some(true)).then(|| chat.top_logprobs.unwrap_or(0));
    call.stamp(&mut request, request_id)?;
    let top_logprobs = request.sampling.logprobs;
    let tools = tools(chat.tools, chat.tool_choice, chat.parallel_tool_calls)?;
    let ask: Ask = asking::ask(&card, request, tools, chat.thinking_token_budget)?;
    let answer = Answer::start(&app.engine, ask).await?;
    let writer = ChatWriter::new(answer, card, top_logprobs, chat.include_reasoning != Some(false));
    if stream { Ok(writer.stream(options)) } else { writer.whole().await }
}

fn prompt(chat: &ChatFields) -> Result<ChatPrompt, ApiError> {
    let mut template_kwargs = chat.chat_template_kwargs.clone().unwrap_or_default();
    if let Some(effort) = &chat.reasoning_effort {
        template_kwargs.entry("reasoning_effort").or_insert_with(|| effort.as_str().into());
        if effort == "none" {
            template_kwargs.entry("enable_thinking").or_insert(false.into());
        }
    }
    let continue_final_message = chat.continue_final_message.unwrap_or(false);
    if continue_final_message && chat.add_generation_prompt == Some(true) {
        let message = "excludes `add_generation_prompt`; set one of them";
        return Err(ApiError::invalid("continue_final_message", message));
    }
    Ok(ChatPrompt {
        tools: None,
        add_generation_prompt: chat.add_generation_prompt.unwrap_or(true),
        continue_final_message,
        template_kwargs,
        messages: conversation(&chat.messages)?,
    })
}
