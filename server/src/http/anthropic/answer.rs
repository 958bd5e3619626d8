//! A message in Anthropic's shapes: one object, or events.

use std::{sync::Arc, time::Duration};

use axum::response::Response;
use futures_util::stream;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tidemill_engine::{ErrorCode, output::Usage as EngineUsage};
use tokio::time;

use super::fields::Display;
use crate::{
    client::{CallError, ModelCard},
    http::{
        ApiError, Family,
        answer::{Answer, Step, StopReason, parsers::Piece},
        json_response, sse,
    },
};

/// A stream that has nothing else to say says so after this long, so that nobody on the way takes it for dead.
const PING_AFTER: Duration = Duration::from_secs(15);
/// Holds the text of a call's input that is no JSON object: cut short, or written badly.
const INVALID_JSON: &str = "INVALID_JSON";

/// Writes one message.
pub struct MessageWriter {
    answer: Answer,
    card: Arc<ModelCard>,
    id: String,
    display: Display,
    blocks: Vec<Block>,
    /// The last of `blocks` is not closed yet.
    open: bool,
    end: Option<End>,
}

/// A part of the answer.
enum Block {
    Text(String),
    Thinking(String),
    ToolUse { id: String, name: String, input: String },
}

struct End {
    reason: StopReason,
    usage: EngineUsage,
    reasoning_tokens: usize,
}

#[derive(Serialize)]
struct BlockDelta<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    index: usize,
    delta: Delta<'a>,
}

#[derive(Serialize)]
#[serde(tag = "type")]
enum Delta<'a> {
    #[serde(rename = "text_delta")]
    Text { text: &'a str },
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: &'a str },
    #[serde(rename = "signature_delta")]
    Signature { signature: String },
    #[serde(rename = "input_json_delta")]
    InputJson { partial_json: &'a str },
}

/// Where a stream is.
enum Stage {
    Start,
    Middle,
    Over,
}

impl MessageWriter {
    /// A writer for this answer.
    pub fn new(answer: Answer, card: Arc<ModelCard>, display: Display) -> Self {
        let id = format!("msg_{}", answer.id);
        Self { answer, card, id, display, blocks: Vec::new(), open: false, end: None }
    }

    /// The message as events.
    pub fn stream(self) -> Response {
        sse::response(stream::unfold((self, Stage::Start), |(mut writer, stage)| async move {
            let mut buffer = Vec::with_capacity(512);
            let next = match stage {
                Stage::Start => {
                    writer.start(&mut buffer);
                    Stage::Middle
                }
                Stage::Middle => writer.go_on(&mut buffer).await,
                Stage::Over => return None,
            };
            Some((buffer, (writer, next)))
        }))
    }

    async fn go_on(&mut self, buffer: &mut Vec<u8>) -> Stage {
        match time::timeout(PING_AFTER, self.answer.next()).await {
            Err(_) => ping(buffer),
            Ok(Some(Ok(step))) => self.step(buffer, step),
            Ok(Some(Err(error))) => {
                self.fail(buffer, error);
                return Stage::Over;
            }
            Ok(None) => {
                match self.checked_end() {
                    Ok(end) => {
                        let delta = json!({
                            "type": "message_delta",
                            "delta": {"stop_reason": stop_reason(&end.reason), "stop_sequence": stop_sequence(&end.reason)},
                            "usage": usage(&end),
                        });
                        sse::event(buffer, "message_delta", &delta);
                        sse::event(buffer, "message_stop", &json!({"type": "message_stop"}));
                    }
                    Err(error) => self.fail(buffer, error),
                }
                return Stage::Over;
            }
        }
        Stage::Middle
    }

    /// Goes out as soon as the request is taken: clients see that, and how long the prompt is.
    fn start(&self, buffer: &mut Vec<u8>) {
        let usage = json!({
            "input_tokens": self.answer.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        });
        let message = self.message(Vec::new(), None, usage);
        sse::event(buffer, "message_start", &json!({"type": "message_start", "message": message}));
        ping(buffer);
    }

    fn step(&mut self, buffer: &mut Vec<u8>, step: Step) {
        for piece in step.pieces {
            if !self.goes_on_with(&piece) {
                self.close(buffer);
                self.open(buffer, &piece);
            }
            let index = self.blocks.len().saturating_sub(1);
            let delta = match &piece {
                Piece::Text(text) => Some(Delta::Text { text }),
                Piece::Reasoning(_) if self.display == Display::Omitted => None,
                Piece::Reasoning(thinking) => Some(Delta::Thinking { thinking }),
                Piece::ToolCallStart { .. } => None,
                Piece::ToolCallArguments { fragment, .. } => {
                    Some(Delta::InputJson { partial_json: fragment })
                }
            };
            if let Some(delta) = delta {
                let delta = BlockDelta { kind: "content_block_delta", index, delta };
                sse::event(buffer, "content_block_delta", &delta);
            }
            self.take(piece);
        }
        if let Some((reason, usage)) = step.end {
            self.close(buffer);
            self.end = Some(End { reason, usage, reasoning_tokens: step.reasoning_tokens });
        }
    }

    /// Whether a piece belongs to the open block.
    fn goes_on_with(&self, piece: &Piece) -> bool {
        let last = self.blocks.last().filter(|_| self.open);
        match (last, piece) {
            (Some(Block::Text(_)), Piece::Text(_)) | (Some(Block::Thinking(_)), Piece::Reasoning(_)) => true,
            // Calls are written one after the other.
            (Some(Block::ToolUse { .. }), Piece::ToolCallArguments { .. }) => true,
            _ => false,
        }
    }

    fn open(&mut self, buffer: &mut Vec<u8>, piece: &Piece) {
        let (block, shown) = match piece {
            Piece::Text(_) => (Block::Text(String::new()), json!({"type": "text", "text": ""})),
            Piece::Reasoning(_) => {
                let shown = json!({"type": "thinking", "thinking": "", "signature": ""});
                (Block::Thinking(String::new()), shown)
            }
            Piece::ToolCallStart { id, name, .. } => {
                let shown = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
                (Block::ToolUse { id: id.clone(), name: name.clone(), input: String::new() }, shown)
            }
            Piece::ToolCallArguments { .. } => {
                unreachable!("arguments follow the start of their call")
            }
        };
        let index = self.blocks.len();
        self.blocks.push(block);
        self.open = true;
        let start = json!({"type": "content_block_start", "index": index, "content_block": shown});
        sse::event(buffer, "content_block_start", &start);
    }

    /// Adds a piece to the last block.
    fn take(&mut self, piece: Piece) {
        match (self.blocks.last_mut(), piece) {
            (Some(Block::Text(whole)), Piece::Text(text))
            | (Some(Block::Thinking(whole)), Piece::Reasoning(text))
            | (Some(Block::ToolUse { input: whole, .. }), Piece::ToolCallArguments { fragment: text, .. }) => {
                whole.push_str(&text);
            }
            _ => {}
        }
    }

    fn close(&mut self, buffer: &mut Vec<u8>) {
        if !self.open {
            return;
        }
        self.open = false;
        let index = self.blocks.len() - 1;
        if let Some(Block::Thinking(thoughts)) = self.blocks.last() {
            let delta = Delta::Signature { signature: signature(thoughts) };
            let delta = BlockDelta { kind: "content_block_delta", index, delta };
            sse::event(buffer, "content_block_delta", &delta);
        }
        sse::event(buffer, "content_block_stop", &json!({"type": "content_block_stop", "index": index}));
    }

    fn fail(&self, buffer: &mut Vec<u8>, error: CallError) {
        let body = ApiError::from(error).body(Family::Anthropic, &self.answer.id);
        sse::event(buffer, "error", &body);
    }

    /// How the answer ended. No stop reason of this family says that somebody aborted it.
    fn checked_end(&mut self) -> Result<End, CallError> {
        match self.end.take() {
            Some(end) if end.reason != StopReason::Abort => Ok(end),
            Some(_) => Err(CallError::new(ErrorCode::Cancelled, "the request was aborted")),
            None => Err(CallError::internal("an answer ended without an end")),
        }
    }

    /// The message in one piece.
    ///
    /// # Errors
    /// Why the engine could not finish it.
    pub async fn whole(mut self) -> Result<Response, ApiError> {
        // The same machine as for streams; nobody reads its events.
        let mut events = Vec::new();
        while let Some(step) = self.answer.next().await {
            self.step(&mut events, step?);
            events.clear();
        }
        let end = self.checked_end()?;
        let content = std::mem::take(&mut self.blocks).into_iter().map(|block| block.json(self.display));
        let content = content.collect();
        Ok(json_response(&self.message(content, Some(&end.reason), usage(&end))))
    }

    fn message(&self, content: Vec<Value>, reason: Option<&StopReason>, usage: Value) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.card.served_model_name,
            "content": content,
            "stop_reason": reason.map(stop_reason),
            "stop_sequence": reason.and_then(stop_sequence),
            "usage": usage,
        })
    }
}

impl Block {
    fn json(self, display: Display) -> Value {
        match self {
            Self::Text(text) => json!({"type": "text", "text": text}),
            Self::Thinking(thoughts) => {
                let signature = signature(&thoughts);
                let shown = if display == Display::Omitted { "" } else { &thoughts };
                json!({"type": "thinking", "thinking": shown, "signature": signature})
            }
            Self::ToolUse { id, name, input } => {
                json!({"type": "tool_use", "id": id, "name": name, "input": arguments(input)})
            }
        }
    }
}

/// The input of a call, which is an object whatever the model wrote.
fn arguments(text: String) -> Value {
    match serde_json::from_str(if text.is_empty() { "{}" } else { &text }) {
        Ok(Value::Object(object)) => Value::Object(object),
        _ => Value::Object(Map::from_iter([(INVALID_JSON.to_owned(), text.into())])),
    }
}

/// SDKs want one and send it back. Thoughts are taken back as text, so it is a digest and proves nothing.
fn signature(thoughts: &str) -> String {
    blake3::hash(thoughts.as_bytes()).to_hex().to_string()
}

fn ping(buffer: &mut Vec<u8>) {
    sse::event(buffer, "ping", &json!({"type": "ping"}));
}

fn stop_reason(reason: &StopReason) -> &'static str {
    match reason {
        // An abort is an error here; it does not come this far.
        StopReason::Stop | StopReason::StopToken(_) | StopReason::Abort => "end_turn",
        StopReason::StopString(_) => "stop_sequence",
        StopReason::Length => "max_tokens",
        StopReason::ToolCalls => "tool_use",
    }
}

fn stop_sequence(reason: &StopReason) -> Option<&str> {
    match reason {
        StopReason::StopString(text) => Some(text),
        _ => None,
    }
}

/// Tokens found in the prefix cache do not count as input, as in the original.
fn usage(end: &End) -> Value {
    let used = &end.usage;
    json!({
        "input_tokens": used.prompt_tokens.saturating_sub(used.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached_tokens,
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"thinking_tokens": end.reasoning_tokens},
    })
}
