//! Requests for the wire.

use serde_json::Value;
use tidemill_engine::{
    RequestError,
    request::{EmbedRequest, GenerateRequest, Prompt, ScoreInput, ScoreRequest},
    sampling::SamplingParams,
    structured::{Structured, Thinking},
    text::chat::{ChatMessage, ChatPrompt},
};
use tidemill_proto::v1;

/// A request as a message. Its deadline and its trace parent travel in headers.
pub fn generate_message(request: GenerateRequest) -> v1::GenerateRequest {
    use v1::generate_request::Prompt as Wire;
    let GenerateRequest {
        id,
        prompt,
        sampling,
        structured,
        thinking,
        token_ids_only,
        include_special_tokens,
        model,
        deadline: _,
        priority,
        tenant,
        credential,
        cache_salt,
        trace_parent: _,
    } = request;
    v1::GenerateRequest {
        request_id: id.map(|id| id.as_str().to_owned()).unwrap_or_default(),
        prompt: Some(match prompt {
            Prompt::Text(text) => Wire::Text(text),
            Prompt::TokenIds(ids) => {
                Wire::TokenIds(v1::TokenIds { ids: ids.into_iter().map(|id| id.0).collect() })
            }
            Prompt::Chat(chat) => Wire::Chat(chat_message(chat)),
        }),
        sampling: Some(sampling_params(sampling)),
        output: Some(v1::OutputOptions { token_ids_only, include_special_tokens }),
        model: model.unwrap_or_default(),
        priority,
        tenant: tenant.as_str().to_owned(),
        cache_salt,
        structured: structured.map(structured_form),
        thinking: thinking.map(|Thinking { start, end, budget }| v1::Thinking { start, end, budget }),
        // The engine has a credential too: the gateway's.
        end_client: (*credential).to_owned(),
    }
}

/// A request for an embedding as a message. Its deadline and its trace parent travel in headers.
///
/// # Errors
/// For a conversation, which has no embedding on the wire.
pub fn embed_message(request: EmbedRequest) -> Result<v1::EmbedRequest, RequestError> {
    use v1::embed_request::Prompt as Wire;
    let EmbedRequest {
        id,
        prompt,
        model,
        deadline: _,
        priority,
        tenant,
        credential,
        cache_salt,
        trace_parent: _,
        dimensions,
        normalize,
        prompt_name,
        truncate_prompt_tokens,
    } = request;
    Ok(v1::EmbedRequest {
        request_id: id.map(|id| id.as_str().to_owned()).unwrap_or_default(),
        prompt: Some(match prompt {
            Prompt::Text(text) => Wire::Text(text),
            Prompt::TokenIds(ids) => {
                Wire::TokenIds(v1::TokenIds { ids: ids.into_iter().map(|id| id.0).collect() })
            }
            Prompt::Chat(_) => {
                return Err(RequestError::invalid("prompt", "is a conversation; embed a text or token ids"));
            }
        }),
        model: model.unwrap_or_default(),
        priority,
        tenant: tenant.as_str().to_owned(),
        cache_salt,
        dimensions,
        normalize,
        prompt_name,
        truncate_prompt_tokens,
        end_client: (*credential).to_owned(),
    })
}

/// A request for a score as a message. Its deadline and its trace parent travel in headers.
pub fn score_message(request: ScoreRequest) -> v1::ScoreRequest {
    use v1::score_request::{Input, Pair, Tokens};
    let ScoreRequest {
        id,
        input,
        instruction,
        model,
        deadline: _,
        priority,
        tenant,
        credential,
        cache_salt,
        trace_parent: _,
        truncate_prompt_tokens,
        use_activation,
    } = request;
    v1::ScoreRequest {
        request_id: id.map(|id| id.as_str().to_owned()).unwrap_or_default(),
        input: Some(match input {
            ScoreInput::Pair { query, document } => Input::Pair(Pair { query, document }),
            ScoreInput::TokenIds { ids, segments } => {
                Input::Tokens(Tokens { ids: ids.into_iter().map(|id| id.0).collect(), segments })
            }
        }),
        instruction,
        model: model.unwrap_or_default(),
        priority,
        tenant: tenant.as_str().to_owned(),
        cache_salt,
        truncate_prompt_tokens,
        use_activation,
        end_client: (*credential).to_owned(),
    }
}

fn sampling_params(sampling: SamplingParams) -> v1::SamplingParams {
    let SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed,
        max_tokens,
        min_tokens,
        stop,
        stop_token_ids,
        ignore_eos,
        logprobs,
        prompt_logprobs,
        n,
    } = sampling;
    v1::SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias: logit_bias.into_iter().map(|(id, bias)| (id.0, bias)).collect(),
        seed,
        max_tokens,
        min_tokens,
        stop,
        stop_token_ids: stop_token_ids.into_iter().map(|id| id.0).collect(),
        ignore_eos,
        logprobs,
        prompt_logprobs,
        n,
    }
}

fn structured_form(structured: Structured) -> v1::Structured {
    use v1::structured::{AnyJsonObject, Choice, Form};
    let form = match structured {
        Structured::JsonObject => Form::JsonObject(AnyJsonObject {}),
        Structured::JsonSchema(schema) => Form::JsonSchema((*schema).to_owned()),
        Structured::Regex(regex) => Form::Regex((*regex).to_owned()),
        Structured::Choice(texts) => Form::Choice(Choice { texts: texts.to_vec() }),
        Structured::Lark(grammar) => Form::Lark((*grammar).to_owned()),
    };
    v1::Structured { form: Some(form) }
}

/// A conversation as a message.
pub fn chat_message(chat: ChatPrompt) -> v1::ChatPrompt {
    let ChatPrompt { messages, tools, add_generation_prompt, continue_final_message, template_kwargs } = chat;
    v1::ChatPrompt {
        messages: messages.into_iter().map(turn).collect(),
        tools_json: json(tools),
        // Absent is true; said aloud, it would contradict `continue_final_message`, which simply wins in the engine.
        add_generation_prompt: (!add_generation_prompt).then_some(false),
        continue_final_message,
        template_kwargs_json: json(Some(template_kwargs).filter(|map| !map.is_empty()).map(Value::Object)),
    }
}

fn turn(message: ChatMessage) -> v1::ChatMessage {
    let ChatMessage { role, content, tool_calls, tool_call_id, name, reasoning_content } = message;
    v1::ChatMessage {
        role,
        content,
        tool_calls_json: json(tool_calls),
        tool_call_id: tool_call_id.unwrap_or_default(),
        name: name.unwrap_or_default(),
        reasoning_content: reasoning_content.unwrap_or_default(),
    }
}

/// JSON in a string; none is an empty one.
fn json(value: Option<Value>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}
