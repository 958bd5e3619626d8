//! From a response's items to the messages that templates know.

use std::collections::HashMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tidemill_engine::text::chat::ChatMessage;

use super::fields::InputField;
use crate::http::ApiError;

/// Most items of an input.
const MAX_ITEMS: usize = 4096;

/// The input as items of the full form, each with an id and a type.
///
/// # Errors
/// 400 for none and for too many.
pub fn items(input: InputField, id: &str) -> Result<Vec<Value>, ApiError> {
    let mut items = match input {
        InputField::Text(text) => vec![json!({"role": "user", "content": text})],
        InputField::Items(items) => items,
    };
    if items.is_empty() {
        return Err(ApiError::invalid("input", "is empty; give a text or at least one item"));
    }
    if items.len() > MAX_ITEMS {
        let message = format!("has {} items; at most {MAX_ITEMS} are accepted", items.len());
        return Err(ApiError::invalid("input", message));
    }
    for (at, item) in items.iter_mut().enumerate() {
        let Some(fields) = item.as_object_mut() else {
            return Err(ApiError::invalid(format!("input[{at}]"), "must be an item: a JSON object"));
        };
        if fields.get("type").is_none_or(Value::is_null) {
            fields.insert("type".to_owned(), "message".into());
        }
        if fields["type"] == "message" {
            let kind =
                if fields.get("role").is_some_and(|role| role == "assistant") { "output" } else { "input" };
            if let Some(Value::String(text)) = fields.get("content") {
                let part = json!([{"type": format!("{kind}_text"), "text": text}]);
                fields.insert("content".to_owned(), part);
            }
        }
        if fields.get("id").is_none_or(Value::is_null) {
            fields.insert("id".to_owned(), format!("in_{id}_{at}").into());
        }
    }
    Ok(items)
}

/// Where items come from, for messages about them.
#[derive(Debug, Clone, Copy)]
pub enum Origin {
    /// The request.
    Input,
    /// A stored response.
    Stored,
}

/// Items as messages of a conversation.
#[derive(Default)]
pub struct Conversation {
    messages: Vec<ChatMessage>,
    /// Names of the functions that were called, by the calls' ids.
    called: HashMap<String, String>,
    /// Thoughts that belong to the assistant's turn that comes next.
    thoughts: String,
}

impl Conversation {
    /// A conversation that begins with these instructions.
    pub fn new(instructions: Option<&str>) -> Self {
        let system =
            instructions.filter(|text| !text.is_empty()).map(|text| ChatMessage::new("system", text));
        Self { messages: system.into_iter().collect(), ..Self::default() }
    }

    /// The messages as the template gets them.
    pub fn messages(self) -> Vec<ChatMessage> {
        self.messages
    }

    /// Adds items.
    ///
    /// # Errors
    /// 400 for what is no text, and for outputs without a call.
    pub fn extend<'a>(
        &mut self,
        items: impl IntoIterator<Item = &'a Value>,
        origin: Origin,
    ) -> Result<(), ApiError> {
        for (at, item) in items.into_iter().enumerate() {
            let place = match origin {
                Origin::Input => format!("input[{at}]"),
                Origin::Stored => "previous_response_id".to_owned(),
            };
            self.item(item, &place)?;
        }
        Ok(())
    }

    fn item(&mut self, item: &Value, place: &str) -> Result<(), ApiError> {
        match item["type"].as_str().unwrap_or_default() {
            "message" => self.message(item, place),
            "function_call" => self.call(item, place),
            "function_call_output" => self.output(item, place),
            "reasoning" => self.reasoning(item, place),
            "item_reference" => Err(ApiError::invalid(
                format!("{place}.type"),
                "items cannot be referred to; send the item itself, or `previous_response_id`",
            )),
            other => Err(ApiError::invalid(
                format!("{place}.type"),
                format!("is {other:?}; use message, function_call, function_call_output or reasoning"),
            )),
        }
    }

    fn message(&mut self, item: &Value, place: &str) -> Result<(), ApiError> {
        let content = text(&item["content"], &format!("{place}.content"))?;
        let role = match item["role"].as_str().unwrap_or_default() {
            "assistant" => {
                self.assistant(|message| message.content.push_str(&content), true);
                return Ok(());
            }
            "user" => "user",
            // Templates know the older word.
            "system" | "developer" => "system",
            other => {
                let message = format!("is {other:?}; use user, assistant, system or developer");
                return Err(ApiError::invalid(format!("{place}.role"), message));
            }
        };
        self.messages.push(ChatMessage::new(role, content));
        Ok(())
    }

    /// Changes the assistant's turn that is under way, or begins one. Text behind a call is another turn.
    fn assistant(&mut self, change: impl FnOnce(&mut ChatMessage), is_text: bool) {
        let goes_on = self.messages.last().is_some_and(|last| {
            last.role == "assistant"
                && self.thoughts.is_empty()
                && (!is_text || (last.tool_calls.is_none() && last.content.is_empty()))
        });
        if !goes_on {
            self.messages.push(ChatMessage::new("assistant", ""));
        }
        if let Some(last) = self.messages.last_mut() {
            if !self.thoughts.is_empty() {
                last.reasoning_content = Some(std::mem::take(&mut self.thoughts));
            }
            change(last);
        }
    }

    fn call(&mut self, item: &Value, place: &str) -> Result<(), ApiError> {
        let (id, name) = (required(item, "call_id", place)?, required(item, "name", place)?);
        let arguments = required(item, "arguments", place)?;
        let parsed: Value = serde_json::from_str(if arguments.is_empty() { "{}" } else { arguments })
            .map_err(|error| {
                ApiError::invalid(format!("{place}.arguments"), format!("is not JSON: {error}"))
            })?;
        self.called.insert(id.to_owned(), name.to_owned());
        let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": parsed}});
        self.assistant(
            |message| match &mut message.tool_calls {
                Some(Value::Array(calls)) => calls.push(call),
                calls => *calls = Some(json!([call])),
            },
            false,
        );
        Ok(())
    }

    fn output(&mut self, item: &Value, place: &str) -> Result<(), ApiError> {
        let id = required(item, "call_id", place)?;
        let Some(name) = self.called.get(id) else {
            let message = format!("is {id:?}, and no function_call before it has this call_id");
            return Err(ApiError::invalid(format!("{place}.call_id"), message));
        };
        let content = text(&item["output"], &format!("{place}.output"))?;
        self.messages.push(ChatMessage {
            tool_call_id: Some(id.to_owned()),
            name: Some(name.clone()),
            ..ChatMessage::new("tool", content)
        });
        Ok(())
    }

    /// Thoughts in clear, or else as we gave them out to be handed back.
    fn reasoning(&mut self, item: &Value, place: &str) -> Result<(), ApiError> {
        let texts = |field: &str| -> String {
            let parts = item[field].as_array().into_iter().flatten();
            parts.filter_map(|part| part["text"].as_str()).collect()
        };
        let clear = [texts("content"), texts("summary")].into_iter().find(|text| !text.is_empty());
        let thoughts = match (clear, item["encrypted_content"].as_str()) {
            (Some(clear), _) => clear,
            (None, Some(sealed)) => unseal(sealed).ok_or_else(|| {
                let message = "was not made here, so it cannot be read; leave the item out";
                ApiError::invalid(format!("{place}.encrypted_content"), message)
            })?,
            (None, None) => String::new(),
        };
        self.thoughts.push_str(&thoughts);
        Ok(())
    }
}

/// Thoughts for clients that hand them back unread. They are no secret from whom they were thought for.
pub fn seal(thoughts: &str) -> String {
    BASE64_STANDARD.encode(thoughts)
}

fn unseal(sealed: &str) -> Option<String> {
    String::from_utf8(BASE64_STANDARD.decode(sealed).ok()?).ok()
}

fn required<'a>(item: &'a Value, name: &str, place: &str) -> Result<&'a str, ApiError> {
    item[name].as_str().ok_or_else(|| ApiError::invalid(format!("{place}.{name}"), "is missing"))
}

/// A text, or parts of text.
fn text(content: &Value, place: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        _ => return Err(ApiError::invalid(place, "must be a text or a list of parts")),
    };
    let mut whole = String::new();
    for (at, part) in parts.iter().enumerate() {
        let field = match part["type"].as_str().unwrap_or_default() {
            "input_text" | "output_text" | "text" => "text",
            "refusal" => "refusal",
            other => {
                let message = format!("is {other:?}; this model reads text alone");
                return Err(ApiError::invalid(format!("{place}[{at}].type"), message));
            }
        };
        whole.push_str(required(part, field, &format!("{place}[{at}]"))?);
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(input: Value, instructions: Option<&str>) -> Result<Vec<ChatMessage>, ApiError> {
        let items = items(serde_json::from_value(input).unwrap(), "r")?;
        let mut conversation = Conversation::new(instructions);
        conversation.extend(&items, Origin::Input)?;
        Ok(conversation.messages())
    }

    #[test]
    fn thoughts_text_and_calls_of_a_turn_are_one_message() {
        let messages = converted(
            json!([
                {"role": "user", "content": [{"type": "input_text", "text": "Sky?"}]},
                {"type": "reasoning", "summary": [], "encrypted_content": seal("Hm.")},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
                {"type": "function_call", "call_id": "a", "name": "sky", "arguments": "{\"city\": \"Oslo\"}"},
                {"type": "function_call", "call_id": "b", "name": "sky", "arguments": ""},
                {"type": "function_call_output", "call_id": "b", "output": "grey"},
                {"role": "assistant", "content": "Grey."},
            ]),
            Some("Be kind."),
        )
        .unwrap();
        let call = |id: &str, arguments: Value| json!({"id": id, "type": "function", "function": {"name": "sky", "arguments": arguments}});
        let calls = json!([call("a", json!({"city": "Oslo"})), call("b", json!({}))]);
        assert_eq!(
            messages,
            [
                ChatMessage::new("system", "Be kind."),
                ChatMessage::new("user", "Sky?"),
                ChatMessage {
                    tool_calls: Some(calls),
                    reasoning_content: Some("Hm.".into()),
                    ..ChatMessage::new("assistant", "I look.")
                },
                ChatMessage {
                    tool_call_id: Some("b".into()),
                    name: Some("sky".into()),
                    ..ChatMessage::new("tool", "grey")
                },
                ChatMessage::new("assistant", "Grey."),
            ]
        );
    }

    #[test]
    fn items_are_completed_as_they_are_listed_later() {
        let listed = items(InputField::Text("Why?".into()), "r").unwrap();
        let part = json!([{"type": "input_text", "text": "Why?"}]);
        assert_eq!(listed, [json!({"id": "in_r_0", "type": "message", "role": "user", "content": part})]);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let image = json!([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]);
        let orphan = json!([{"type": "function_call_output", "call_id": "a", "output": ""}]);
        let foreign = json!([{"type": "reasoning", "summary": [], "encrypted_content": "?"}]);
        for (input, param) in [
            (json!([]), "input"),
            (json!([5]), "input[0]"),
            (image, "input[0].content[0].type"),
            (orphan, "input[0].call_id"),
            (foreign, "input[0].encrypted_content"),
            (json!([{"type": "item_reference", "id": "x"}]), "input[0].type"),
            (json!([{"role": "nobody", "content": "x"}]), "input[0].role"),
        ] {
            assert_eq!(converted(input, None).unwrap_err().param.as_deref(), Some(param));
        }
    }
}
