//! From Anthropic's turns and blocks to the messages that templates know.

use std::collections::HashMap;

use serde_json::{Value, json};
use tidemill_engine::text::chat::ChatMessage;

use super::fields::{Block, Content, MessageParam, ResultBlock, ResultContent};
use crate::http::ApiError;

/// Between texts of neighbouring turns of one role, which count as one turn.
const BETWEEN_TURNS: &str = "\n\n";
/// Before what a tool said when it failed: templates have no other place for that.
const TOOL_FAILED: &str = "Error: ";

/// The messages as the template gets them, and whether the answer goes on from the last of them.
///
/// # Errors
/// 400 for what is no text, and for calls and results that do not belong together.
pub fn conversation(
    system: Option<&Content>,
    turns: &[MessageParam],
) -> Result<(Vec<ChatMessage>, bool), ApiError> {
    let Some(last) = turns.last() else {
        return Err(ApiError::invalid("messages", "is empty; give at least one message"));
    };
    let mut list = Conversation::default();
    if let Some(system) = system {
        let text = plain(system, "system")?;
        if !text.is_empty() {
            list.messages.push(ChatMessage::new("system", text));
        }
    }
    for (at, turn) in turns.iter().enumerate() {
        let field = format!("messages[{at}]");
        match turn.role.as_str() {
            "user" => list.user(&turn.content, &field)?,
            "assistant" => list.assistant(&turn.content, &field)?,
            "system" => {
                let text = plain(&turn.content, &format!("{field}.content"))?;
                list.messages.push(ChatMessage::new("system", text));
            }
            other => {
                let message = format!("is {other:?}; use user, assistant or system");
                return Err(ApiError::invalid(format!("{field}.role"), message));
            }
        }
    }
    let goes_on = last.role == "assistant";
    if goes_on && list.messages.last().is_some_and(|message| message.tool_calls.is_some()) {
        let message = "end with tool calls; answer them with `tool_result` blocks in a turn of the user";
        return Err(ApiError::invalid("messages", message));
    }
    Ok((list.messages, goes_on))
}

#[derive(Default)]
struct Conversation {
    messages: Vec<ChatMessage>,
    /// Names of the tools that were called, by the calls' ids.
    called: HashMap<String, String>,
}

impl Conversation {
    /// Text and results of tools, in their order.
    fn user(&mut self, content: &Content, field: &str) -> Result<(), ApiError> {
        let blocks = match content {
            Content::Text(text) => {
                self.say("user", text);
                return Ok(());
            }
            Content::Blocks(blocks) => blocks,
        };
        let mut text: Option<String> = None;
        for (at, block) in blocks.iter().enumerate() {
            let field = format!("{field}.content[{at}]");
            match block.kind.as_str() {
                "text" => text.get_or_insert_default().push_str(required(&block.text, &field, "text")?),
                "tool_result" => {
                    if let Some(text) = text.take() {
                        self.say("user", &text);
                    }
                    let result = self.result(block, &field)?;
                    self.messages.push(result);
                }
                other => return Err(unknown(other, &field, "text and tool_result")),
            }
        }
        if let Some(text) = text {
            self.say("user", &text);
        }
        Ok(())
    }

    fn result(&self, block: &Block, field: &str) -> Result<ChatMessage, ApiError> {
        let id = required(&block.tool_use_id, field, "tool_use_id")?;
        let Some(name) = self.called.get(id) else {
            let message = format!("is {id:?}, and no tool_use block before it has this id");
            return Err(ApiError::invalid(format!("{field}.tool_use_id"), message));
        };
        let mut content = match &block.content {
            None => String::new(),
            Some(ResultContent::Text(text)) => text.clone(),
            Some(ResultContent::Blocks(blocks)) => result_text(blocks, field)?,
        };
        if block.is_error == Some(true) {
            content.insert_str(0, TOOL_FAILED);
        }
        Ok(ChatMessage {
            tool_call_id: Some(id.to_owned()),
            name: Some(name.clone()),
            ..ChatMessage::new("tool", content)
        })
    }

    /// Thoughts, text and calls of one turn.
    fn assistant(&mut self, content: &Content, field: &str) -> Result<(), ApiError> {
        let blocks = match content {
            Content::Text(text) => {
                self.say("assistant", text);
                return Ok(());
            }
            Content::Blocks(blocks) => blocks,
        };
        let (mut text, mut thoughts, mut calls) = (String::new(), String::new(), Vec::new());
        for (at, block) in blocks.iter().enumerate() {
            let field = format!("{field}.content[{at}]");
            match block.kind.as_str() {
                "text" => text.push_str(required(&block.text, &field, "text")?),
                "thinking" => thoughts.push_str(required(&block.thinking, &field, "thinking")?),
                "tool_use" => {
                    let id = required(&block.id, &field, "id")?;
                    let name = required(&block.name, &field, "name")?;
                    let input = block.input.clone().unwrap_or_default();
                    self.called.insert(id.to_owned(), name.to_owned());
                    let function = json!({"name": name, "arguments": input});
                    calls.push(json!({"id": id, "type": "function", "function": function}));
                }
                other => return Err(unknown(other, &field, "text, thinking and tool_use")),
            }
        }
        self.say("assistant", &text);
        if let Some(message) = self.messages.last_mut() {
            message.tool_calls = (!calls.is_empty()).then_some(Value::Array(calls));
            if !thoughts.is_empty() {
                message.reasoning_content.get_or_insert_default().push_str(&thoughts);
            }
        }
        Ok(())
    }

    /// Adds text. Neighbouring turns of one role are one turn; calls end an assistant's.
    fn say(&mut self, role: &str, text: &str) {
        match self.messages.last_mut() {
            Some(last) if last.role == role && last.tool_calls.is_none() => {
                if !last.content.is_empty() && !text.is_empty() {
                    last.content.push_str(BETWEEN_TURNS);
                }
                last.content.push_str(text);
            }
            _ => self.messages.push(ChatMessage::new(role, text)),
        }
    }
}

/// The text of a place where nothing but text can stand.
fn plain(content: &Content, field: &str) -> Result<String, ApiError> {
    match content {
        Content::Text(text) => Ok(text.clone()),
        Content::Blocks(blocks) => {
            let mut whole = String::new();
            for (at, block) in blocks.iter().enumerate() {
                let field = format!("{field}[{at}]");
                if block.kind != "text" {
                    return Err(unknown(&block.kind, &field, "text"));
                }
                whole.push_str(required(&block.text, &field, "text")?);
            }
            Ok(whole)
        }
    }
}

fn result_text(blocks: &[ResultBlock], field: &str) -> Result<String, ApiError> {
    let mut whole = String::new();
    for (at, block) in blocks.iter().enumerate() {
        let field = format!("{field}.content[{at}]");
        if block.kind != "text" {
            return Err(unknown(&block.kind, &field, "text"));
        }
        whole.push_str(required(&block.text, &field, "text")?);
    }
    Ok(whole)
}

fn required<'a>(value: &'a Option<String>, field: &str, name: &str) -> Result<&'a str, ApiError> {
    value.as_deref().ok_or_else(|| ApiError::invalid(format!("{field}.{name}"), "is missing"))
}

fn unknown(kind: &str, field: &str, known: &str) -> ApiError {
    let message = format!("is {kind:?}; this model reads text alone, and what can stand here is {known}");
    ApiError::invalid(format!("{field}.type"), message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(system: Value, turns: Value) -> Result<(Vec<ChatMessage>, bool), ApiError> {
        let system: Option<Content> = serde_json::from_value(system).unwrap();
        let turns: Vec<MessageParam> = serde_json::from_value(turns).unwrap();
        conversation(system.as_ref(), &turns)
    }

    #[test]
    fn thoughts_calls_and_results_find_their_places() {
        let (messages, goes_on) = converted(
            json!([{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]),
            json!([
                {"role": "user", "content": "Weather?"},
                {"role": "user", "content": [{"type": "text", "text": "In Oslo."}]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "sky", "input": {"city": "Oslo"}},
                ]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "grey"}], "is_error": true},
                    {"type": "text", "text": "And?"},
                ]},
                {"role": "assistant", "content": "It is"},
            ]),
        )
        .unwrap();
        let call = json!([{"id": "t1", "type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo"}}}]);
        assert_eq!(
            messages,
            [
                ChatMessage::new("system", "Be kind."),
                ChatMessage::new("user", "Weather?\n\nIn Oslo."),
                ChatMessage {
                    tool_calls: Some(call),
                    reasoning_content: Some("Hm.".into()),
                    ..ChatMessage::new("assistant", "I look.")
                },
                ChatMessage {
                    tool_call_id: Some("t1".into()),
                    name: Some("sky".into()),
                    ..ChatMessage::new("tool", "Error: grey")
                },
                ChatMessage::new("user", "And?"),
                ChatMessage::new("assistant", "It is"),
            ]
        );
        assert!(goes_on);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let image = json!([{"role": "user", "content": [{"type": "image", "source": {}}]}]);
        let orphan = json!([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]}]);
        let open = json!([{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]);
        for (turns, param, word) in [
            (image, "messages[0].content[0].type", "image"),
            (orphan, "messages[0].content[0].tool_use_id", "t1"),
            (open, "messages", "tool_result"),
            (json!([{"role": "nobody", "content": "a"}]), "messages[0].role", "nobody"),
            (json!([]), "messages", "empty"),
        ] {
            let error = converted(Value::Null, turns).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param));
            assert!(error.message.contains(word), "{}", error.message);
        }
    }
}
