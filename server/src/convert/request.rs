//! Requests from the wire.

use std::sync::Arc;

use tidemill_engine::{
    RequestError,
    ids::{RequestId, TenantId, TokenId},
    request::{GenerateRequest, Prompt},
    sampling::SamplingParams,
    structured::{Structured, Thinking},
    text::chat::{ChatMessage, ChatPrompt},
};
use tidemill_proto::v1;

/// A request of the wire in the engine's terms, under the id that it has or was given.
///
/// # Errors
/// When there is no prompt, or JSON inside of it is malformed.
pub fn generate_request(
    id: RequestId,
    request: v1::GenerateRequest,
) -> Result<GenerateRequest, RequestError> {
    use v1::generate_request::Prompt as Wire;
    let prompt = match request.prompt {
        Some(Wire::Text(text)) => Prompt::Text(text),
        Some(Wire::TokenIds(ids)) => Prompt::TokenIds(token_ids(ids.ids)),
        Some(Wire::Chat(chat)) => Prompt::Chat(chat_prompt(chat, "prompt.chat")?),
        None => return Err(RequestError::invalid("prompt", "is absent; set text, token_ids or chat")),
    };
    let output = request.output.unwrap_or_default();
    Ok(GenerateRequest {
        id: Some(id),
        sampling: sampling(request.sampling.unwrap_or_default()),
        structured: request.structured.map(structured).transpose()?,
        thinking: request.thinking.map(|wire| Thinking {
            start: wire.start,
            end: wire.end,
            budget: wire.budget,
        }),
        token_ids_only: output.token_ids_only,
        include_special_tokens: output.include_special_tokens,
        model: Some(request.model).filter(|model| !model.is_empty()),
        priority: request.priority,
        tenant: TenantId::new(request.tenant),
        credential: end_client(request.end_client)?,
        cache_salt: request.cache_salt,
        ..GenerateRequest::new(prompt)
    })
}

/// Longest name of an end client in bytes.
const MAX_END_CLIENT_BYTES: usize = 128;

/// Whom a request is for, as a credential. The door adds that of the connection.
///
/// # Errors
/// When it is too long.
pub fn end_client(name: String) -> Result<Arc<str>, RequestError> {
    if name.len() > MAX_END_CLIENT_BYTES {
        let message = format!("longer than {MAX_END_CLIENT_BYTES} bytes");
        return Err(RequestError::invalid("end_client", message));
    }
    Ok(name.into())
}

/// Bare numbers as token ids; the engine checks them.
pub fn token_ids(ids: Vec<u32>) -> Vec<TokenId> {
    ids.into_iter().map(TokenId).collect()
}

fn structured(wire: v1::Structured) -> Result<Structured, RequestError> {
    use v1::structured::Form;
    Ok(match wire.form {
        Some(Form::JsonObject(_)) => Structured::JsonObject,
        Some(Form::JsonSchema(schema)) => Structured::JsonSchema(schema.into()),
        Some(Form::Regex(regex)) => Structured::Regex(regex.into()),
        Some(Form::Choice(choice)) => Structured::Choice(choice.texts.into()),
        Some(Form::Lark(grammar)) => Structured::Lark(grammar.into()),
        None => {
            let message = "is empty; set json_object, json_schema, regex, choice or lark";
            return Err(RequestError::invalid("structured", message));
        }
    })
}

fn sampling(wire: v1::SamplingParams) -> SamplingParams {
    let mut logit_bias: Vec<_> = wire.logit_bias.into_iter().map(|(id, bias)| (TokenId(id), bias)).collect();
    // The wire's map has no order; the same request shall always be the same.
    logit_bias.sort_unstable_by_key(|&(id, _)| id);
    SamplingParams {
        temperature: wire.temperature,
        top_k: wire.top_k,
        top_p: wire.top_p,
        min_p: wire.min_p,
        repetition_penalty: wire.repetition_penalty,
        presence_penalty: wire.presence_penalty,
        frequency_penalty: wire.frequency_penalty,
        logit_bias,
        seed: wire.seed,
        max_tokens: wire.max_tokens,
        min_tokens: wire.min_tokens,
        stop: wire.stop,
        stop_token_ids: token_ids(wire.stop_token_ids),
        ignore_eos: wire.ignore_eos,
        logprobs: wire.logprobs,
        prompt_logprobs: wire.prompt_logprobs,
        n: wire.n,
    }
}

/// A conversation from the wire; `field` is its place in the request, for messages.
///
/// # Errors
/// When tools or tool calls are not JSON arrays.
pub fn chat_prompt(chat: v1::ChatPrompt, field: &'static str) -> Result<ChatPrompt, RequestError> {
    let messages = chat.messages.into_iter().map(|message| {
        let tool_calls = json_array(&message.tool_calls_json, field, "tool_calls_json")?;
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        Ok(ChatMessage {
            role: message.role,
            content: message.content,
            tool_calls,
            tool_call_id: some(message.tool_call_id),
            name: some(message.name),
            reasoning_content: some(message.reasoning_content),
        })
    });
    if chat.continue_final_message && chat.add_generation_prompt == Some(true) {
        let message = "continue_final_message excludes add_generation_prompt; set one of them";
        return Err(RequestError::invalid(field, message));
    }
    Ok(ChatPrompt {
        messages: messages.collect::<Result<_, RequestError>>()?,
        tools: json_array(&chat.tools_json, field, "tools_json")?,
        add_generation_prompt: chat.add_generation_prompt.unwrap_or(true),
        continue_final_message: chat.continue_final_message,
        template_kwargs: template_kwargs(&chat.template_kwargs_json, field)?,
    })
}

fn template_kwargs(
    text: &str,
    field: &'static str,
) -> Result<serde_json::Map<String, serde_json::Value>, RequestError> {
    if text.is_empty() {
        return Ok(serde_json::Map::new());
    }
    let wrong =
        |error| RequestError::invalid(field, format!("template_kwargs_json is no JSON object: {error}"));
    serde_json::from_str(text).map_err(wrong)
}

/// A JSON array in a string; an empty string is none. serde_json bounds the depth.
fn json_array(
    text: &str,
    field: &'static str,
    name: &str,
) -> Result<Option<serde_json::Value>, RequestError> {
    if text.is_empty() {
        return Ok(None);
    }
    match serde_json::from_str(text) {
        Ok(value @ serde_json::Value::Array(_)) => Ok(Some(value)),
        Ok(_) => Err(RequestError::invalid(field, format!("{name} is JSON, but not an array"))),
        Err(error) => Err(RequestError::invalid(field, format!("{name} is not JSON: {error}"))),
    }
}
