//! Messages of a conversation in OpenAI's form.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;
use tidemill_engine::text::chat::ChatMessage;

use crate::http::ApiError;

/// One message.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct MessageField {
    /// system, developer, user, assistant, tool, or what the template knows.
    pub role: String,
    /// Text, or parts of text.
    #[serde(default)]
    pub content: Option<ContentField>,
    /// Calls that the assistant made.
    #[serde(default)]
    pub tool_calls: Option<Vec<Value>>,
    /// The call that a tool answers.
    #[serde(default)]
    pub tool_call_id: Option<String>,
    /// Who speaks.
    #[serde(default)]
    pub name: Option<String>,
    /// What the assistant thought.
    #[serde(default)]
    pub reasoning_content: Option<String>,
}

/// The content of a message.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ContentField {
    /// Text.
    Text(String),
    /// Parts; only those of text are supported.
    Parts(Vec<ContentPart>),
}

/// A part of a content.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ContentPart {
    /// text; refusal in an assistant's message.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text.
    #[serde(default)]
    pub text: Option<String>,
    /// The text of a refusal.
    #[serde(default)]
    pub refusal: Option<String>,
}

impl ContentField {
    /// The whole text; `field` is its place, for messages.
    ///
    /// # Errors
    /// 400 for images, sound and files.
    pub fn text(&self, field: &str) -> Result<String, ApiError> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::Parts(parts) => {
                let mut whole = String::new();
                for (at, part) in parts.iter().enumerate() {
                    let text = match part.kind.as_str() {
                        "text" | "input_text" | "output_text" => part.text.as_deref(),
                        "refusal" => part.refusal.as_deref(),
                        other => {
                            let message = format!("is {other:?}; this model reads text alone");
                            return Err(ApiError::invalid(format!("{field}[{at}].type"), message));
                        }
                    };
                    let missing = || ApiError::invalid(format!("{field}[{at}].text"), "is missing");
                    whole.push_str(text.ok_or_else(missing)?);
                }
                Ok(whole)
            }
        }
    }
}

/// The messages as the template gets them.
///
/// # Errors
/// 400 for what is no text, and for malformed tool calls.
pub fn conversation(messages: &[MessageField]) -> Result<Vec<ChatMessage>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "is empty; give at least one message"));
    }
    let convert = |(at, message): (usize, &MessageField)| {
        let content = match &message.content {
            Some(content) => content.text(&format!("messages[{at}].content"))?,
            // An assistant may have called tools without a word.
            None if message.role == "assistant" => String::new(),
            None => {
                let message = "is missing; only an assistant's message can do without";
                return Err(ApiError::invalid(format!("messages[{at}].content"), message));
            }
        };
        let calls = message.tool_calls.as_deref().filter(|calls| !calls.is_empty());
        Ok(ChatMessage {
            // Templates know the older word.
            role: if message.role == "developer" { "system".to_owned() } else { message.role.clone() },
            content,
            tool_calls: calls.map(|calls| tool_calls(calls, at)).transpose()?,
            tool_call_id: message.tool_call_id.clone(),
            name: message.name.clone(),
            reasoning_content: message.reasoning_content.clone(),
        })
    };
    messages.iter().enumerate().map(convert).collect()
}

/// Calls with their arguments as objects, which is what templates expect; on the wire they are JSON in a string.
fn tool_calls(calls: &[Value], message: usize) -> Result<Value, ApiError> {
    let mut calls = calls.to_vec();
    for (at, call) in calls.iter_mut().enumerate() {
        let field = || format!("messages[{message}].tool_calls[{at}].function");
        let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
            return Err(ApiError::invalid(field(), "is missing"));
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(ApiError::invalid(field() + ".name", "is missing"));
        }
        if let Some(Value::String(text)) = function.get("arguments") {
            let text = if text.is_empty() { "{}" } else { text };
            let arguments: Value = serde_json::from_str(text).map_err(|error| {
                ApiError::invalid(field() + ".arguments", format!("is not JSON: {error}"))
            })?;
            function.insert("arguments".to_owned(), arguments);
        }
    }
    Ok(Value::Array(calls))
}
