//! The text side against Hugging Face transformers: `fixtures/demo/chat.json` is made by `scripts/make_goldens.py` with the
//! built-in model's own tokenizer and template.

#![allow(clippy::unwrap_used)]

use serde::Deserialize;
use serde_json::Value;
use tidemill_engine::{
    ids::TokenId,
    model::{ModelFiles, ModelSource, ModelSpec},
    text::{ChatMessage, ChatPrompt, TextModel},
};

#[derive(Deserialize)]
struct Golden {
    conversations: Vec<Conversation>,
    strings: Vec<Text>,
}

#[derive(Deserialize)]
struct Conversation {
    name: String,
    messages: Vec<Message>,
    tools: Option<Value>,
    add_generation_prompt: bool,
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
    tool_calls: Option<Value>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
    ids_with_special: Vec<u32>,
    decoded: String,
    decoded_without_special: String,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("fixtures/demo/chat.json")).unwrap()
}

fn demo() -> TextModel {
    let files = ModelFiles::open(&ModelSource::Builtin).unwrap();
    TextModel::load(&files, &ModelSpec::load(&files).unwrap()).unwrap()
}

fn numbers(ids: &[TokenId]) -> Vec<u32> {
    ids.iter().map(|id| id.0).collect()
}

#[test]
fn conversations_render_and_encode_as_transformers_does() {
    let model = demo();
    for case in golden().conversations {
        let message =
            |m: Message| ChatMessage { tool_calls: m.tool_calls, ..ChatMessage::new(m.role, m.content) };
        let prompt = ChatPrompt {
            tools: case.tools,
            add_generation_prompt: case.add_generation_prompt,
            ..ChatPrompt::new(case.messages.into_iter().map(message).collect())
        };
        let text = model.render_chat(&prompt).unwrap();
        let ids = model.encode(&text, false).unwrap();
        assert_eq!(text, case.text, "{}", case.name);
        assert_eq!(numbers(&ids), case.ids, "{}", case.name);
    }
}

#[test]
fn strings_encode_and_decode_as_transformers_does() {
    let model = demo();
    for case in golden().strings {
        let ids = model.encode(&case.text, false).unwrap();
        assert_eq!(numbers(&ids), case.ids, "{:?}", case.text);
        assert_eq!(
            numbers(&model.encode(&case.text, true).unwrap()),
            case.ids_with_special,
            "{:?}",
            case.text
        );
        assert_eq!(model.decode(&ids, true).unwrap(), case.decoded, "{:?}", case.text);
        assert_eq!(model.decode(&ids, false).unwrap(), case.decoded_without_special, "{:?}", case.text);
        assert!(model.min_tokens_for_bytes(case.text.len()) <= ids.len(), "{:?}", case.text);
    }
}
