//! A response while it is made, and the events that tell of it.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};
use tidemill_engine::output::Usage as EngineUsage;

use super::{fields::ThoughtStyle, input::seal};
use crate::{
    client::{CallError, ModelCard},
    clock::since_1970,
    http::{
        ApiError,
        answer::{Step, StopReason, parsers::Piece},
        openai::logprobs::{self, ChatLogprob},
        sse,
    },
};

/// How far a response, or an item of it, is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It is being made.
    InProgress,
    /// The model ended it.
    Completed,
    /// It was cut off.
    Incomplete,
    /// The engine could not finish it.
    Failed,
    /// Somebody ended it.
    Cancelled,
}

/// A response while it is made.
pub struct Draft {
    /// Its name.
    pub id: String,
    /// What was asked, as responses repeat it.
    pub echo: Map<String, Value>,
    card: Arc<ModelCard>,
    style: Style,
    output: Vec<Item>,
    status: Status,
    error: Value,
    usage: Value,
    completed_at: Option<u64>,
    /// Of tokens whose text has not come yet.
    owed: Vec<ChatLogprob>,
}

/// How a response shows what the model wrote.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Alternatives of each token; `None` without log-probabilities.
    pub logprobs: Option<u32>,
    /// Of thoughts.
    pub thoughts: ThoughtStyle,
}

/// One thing that the model wrote.
struct Item {
    id: String,
    status: Status,
    kind: Kind,
    /// The text, the thoughts, the arguments.
    text: String,
    logprobs: Vec<ChatLogprob>,
}

enum Kind {
    Message,
    Reasoning,
    Call { call_id: String, name: String },
}

/// Events of a stream, numbered; or none, where nobody listens.
pub struct Events {
    buffer: Option<Vec<u8>>,
    next: u64,
}

#[derive(Default, Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    sequence_number: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    response: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    item_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    summary_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    item: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    part: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [ChatLogprob]>,
}

impl Events {
    /// For a stream.
    pub fn on() -> Self {
        Self { buffer: Some(Vec::with_capacity(512)), next: 0 }
    }

    /// Nobody listens.
    pub fn off() -> Self {
        Self { buffer: None, next: 0 }
    }

    /// What has been written since the last call.
    pub fn take(&mut self) -> Vec<u8> {
        self.buffer.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn is_on(&self) -> bool {
        self.buffer.is_some()
    }

    fn emit(&mut self, event: Event<'_>) {
        if let Some(buffer) = &mut self.buffer {
            sse::event(buffer, event.kind, &Event { sequence_number: self.next, ..event });
            self.next += 1;
        }
    }
}

impl Draft {
    /// A response that has nothing yet.
    pub fn new(id: String, echo: Map<String, Value>, card: Arc<ModelCard>, style: Style) -> Self {
        Self {
            id,
            echo,
            card,
            style,
            output: Vec::new(),
            status: Status::InProgress,
            error: Value::Null,
            usage: Value::Null,
            completed_at: None,
            owed: Vec::new(),
        }
    }

    /// Whether nothing can be added any more.
    pub fn is_over(&self) -> bool {
        self.status != Status::InProgress
    }

    /// Tells that the request was taken.
    pub fn begin(&self, events: &mut Events) {
        for kind in ["response.created", "response.in_progress"] {
            self.tell(kind, events);
        }
    }

    /// Adds what is new. Nothing is added to a response that is over.
    pub fn step(&mut self, step: Step, events: &mut Events) {
        if self.is_over() {
            return;
        }
        if let Some(top) = self.style.logprobs {
            self.owed.extend(logprobs::chat(&self.card, &step.logprobs, top));
        }
        for piece in step.pieces {
            if !self.goes_on_with(&piece) {
                self.close(Status::Completed, events);
                self.open(&piece, events);
            }
            self.add(piece, events);
        }
        if let Some((reason, usage)) = step.end {
            self.usage = usage_json(&usage, step.reasoning_tokens);
            self.end(&reason, events);
        }
    }

    fn end(&mut self, reason: &StopReason, events: &mut Events) {
        let (status, item, event) = match reason {
            StopReason::Length => (Status::Incomplete, Status::Incomplete, "response.incomplete"),
            StopReason::Abort => (Status::Cancelled, Status::Incomplete, "response.incomplete"),
            _ => (Status::Completed, Status::Completed, "response.completed"),
        };
        self.close(item, events);
        self.status = status;
        self.completed_at = (status == Status::Completed).then(|| since_1970().as_secs());
        self.tell(event, events);
    }

    /// The engine could not finish it.
    pub fn fail(&mut self, error: CallError, events: &mut Events) {
        if self.is_over() {
            return;
        }
        let error = ApiError::from(error);
        let code = if error.status.as_u16() == 429 { "rate_limit_exceeded" } else { "server_error" };
        self.close(Status::Incomplete, events);
        self.error = json!({"code": code, "message": error.message});
        self.status = Status::Failed;
        self.tell("response.failed", events);
    }

    /// Somebody ended it.
    pub fn cancel(&mut self) {
        if !self.is_over() {
            self.close(Status::Incomplete, &mut Events::off());
            self.status = Status::Cancelled;
        }
    }

    fn tell(&self, kind: &'static str, events: &mut Events) {
        if events.is_on() {
            events.emit(Event { kind, response: Some(self.json()), ..Event::default() });
        }
    }

    /// Whether a piece belongs to the last item.
    fn goes_on_with(&self, piece: &Piece) -> bool {
        let last = self.output.last().filter(|item| item.status == Status::InProgress);
        matches!(
            (last.map(|item| &item.kind), piece),
            (Some(Kind::Message), Piece::Text(_))
                | (Some(Kind::Reasoning), Piece::Reasoning(_))
                // Calls are written one after the other.
                | (Some(Kind::Call { .. }), Piece::ToolCallArguments { .. })
        )
    }

    fn open(&mut self, piece: &Piece, events: &mut Events) {
        let (prefix, kind) = match piece {
            Piece::Text(_) => ("msg", Kind::Message),
            Piece::Reasoning(_) => ("rs", Kind::Reasoning),
            Piece::ToolCallStart { id, name, .. } => {
                ("fc", Kind::Call { call_id: id.clone(), name: name.clone() })
            }
            Piece::ToolCallArguments { .. } => unreachable!("arguments follow the start of their call"),
        };
        let index = self.output.len();
        // `resp_` stands before the request's own name.
        let name = self.id.strip_prefix("resp_").unwrap_or(&self.id);
        let id = format!("{prefix}_{name}_{index}");
        self.output.push(Item {
            id,
            status: Status::InProgress,
            kind,
            text: String::new(),
            logprobs: Vec::new(),
        });
        if !events.is_on() {
            return;
        }
        let item = &self.output[index];
        let added = Some(item.json(self.style, false));
        let kind = "response.output_item.added";
        events.emit(Event { kind, output_index: Some(index), item: added, ..Event::default() });
        if let Some(names) = item.names(self.style) {
            let part = Some(item.part(self.style));
            events.emit(Event { part, ..item.event(names.part_added, index, self.style) });
        }
    }

    fn add(&mut self, piece: Piece, events: &mut Events) {
        let Some(index) = self.output.len().checked_sub(1) else { return };
        let item = &mut self.output[index];
        let (text, delta) = match piece {
            Piece::Text(text) => (text, "response.output_text.delta"),
            Piece::Reasoning(text) if self.style.thoughts.as_summary => {
                (text, "response.reasoning_summary_text.delta")
            }
            Piece::Reasoning(text) => (text, "response.reasoning_text.delta"),
            Piece::ToolCallArguments { fragment, .. } => (fragment, "response.function_call_arguments.delta"),
            Piece::ToolCallStart { .. } => return self.owed.clear(),
        };
        // Log-probabilities are of the message's text alone.
        let said = std::mem::take(&mut self.owed);
        let logprobs = matches!(item.kind, Kind::Message).then_some(said.as_slice());
        events.emit(Event { delta: Some(&text), logprobs, ..item.event(delta, index, self.style) });
        item.text.push_str(&text);
        if matches!(item.kind, Kind::Message) {
            item.logprobs.extend(said);
        }
    }

    /// Closes the last item, if it is open.
    fn close(&mut self, status: Status, events: &mut Events) {
        let Some(index) = self.output.len().checked_sub(1) else { return };
        let item = &mut self.output[index];
        if item.status != Status::InProgress {
            return;
        }
        item.status = status;
        if matches!(item.kind, Kind::Message) {
            item.logprobs.append(&mut self.owed);
        }
        if !events.is_on() {
            return;
        }
        let style = self.style;
        match (&item.kind, item.names(style)) {
            (Kind::Call { name, .. }, _) => {
                let event = item.event("response.function_call_arguments.done", index, style);
                events.emit(Event { name: Some(name), arguments: Some(&item.text), ..event });
            }
            (kind, Some(names)) => {
                let logprobs = matches!(kind, Kind::Message).then_some(item.logprobs.as_slice());
                let event = item.event(names.text_done, index, style);
                events.emit(Event { text: Some(&item.text), logprobs, ..event });
                let part = Some(item.part(style));
                events.emit(Event { part, ..item.event(names.part_done, index, style) });
            }
            (_, None) => {}
        }
        let done = Some(item.json(style, true));
        let kind = "response.output_item.done";
        events.emit(Event { kind, output_index: Some(index), item: done, ..Event::default() });
    }

    /// The response as it stands.
    pub fn json(&self) -> Value {
        let mut response = self.echo.clone();
        let output: Vec<Value> = self.output.iter().map(|item| item.json(self.style, true)).collect();
        let reason = match self.status {
            Status::Incomplete => json!({"reason": "max_output_tokens"}),
            _ => Value::Null,
        };
        let own = [
            ("id", self.id.as_str().into()),
            ("object", "response".into()),
            ("model", self.card.served_model_name.as_str().into()),
            ("status", json!(self.status)),
            ("output", output.into()),
            ("error", self.error.clone()),
            ("incomplete_details", reason),
            ("usage", self.usage.clone()),
            ("completed_at", json!(self.completed_at)),
        ];
        response.extend(own.map(|(name, value)| (name.to_owned(), value)));
        Value::Object(response)
    }
}

/// Names of the events of an item that has parts.
struct Names {
    part_added: &'static str,
    text_done: &'static str,
    part_done: &'static str,
}

const IN_CONTENT: (&str, &str) = ("response.content_part.added", "response.content_part.done");
const IN_SUMMARY: (&str, &str) =
    ("response.reasoning_summary_part.added", "response.reasoning_summary_part.done");

impl Item {
    fn names(&self, style: Style) -> Option<Names> {
        let ((part_added, part_done), text_done) = match self.kind {
            Kind::Message => (IN_CONTENT, "response.output_text.done"),
            Kind::Reasoning if style.thoughts.as_summary => {
                (IN_SUMMARY, "response.reasoning_summary_text.done")
            }
            Kind::Reasoning => (IN_CONTENT, "response.reasoning_text.done"),
            Kind::Call { .. } => return None,
        };
        Some(Names { part_added, text_done, part_done })
    }

    /// An event about this item, with its place.
    fn event(&self, kind: &'static str, index: usize, style: Style) -> Event<'_> {
        let in_summary = matches!(self.kind, Kind::Reasoning) && style.thoughts.as_summary;
        let in_content = !in_summary && !matches!(self.kind, Kind::Call { .. });
        Event {
            kind,
            output_index: Some(index),
            item_id: Some(&self.id),
            content_index: in_content.then_some(0),
            summary_index: in_summary.then_some(0),
            ..Event::default()
        }
    }

    fn part(&self, style: Style) -> Value {
        match self.kind {
            Kind::Message => {
                json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs})
            }
            _ if style.thoughts.as_summary => json!({"type": "summary_text", "text": self.text}),
            _ => json!({"type": "reasoning_text", "text": self.text}),
        }
    }

    /// The item; without parts when these are still to be added.
    fn json(&self, style: Style, with_parts: bool) -> Value {
        let parts: Vec<Value> = if with_parts { vec![self.part(style)] } else { Vec::new() };
        match &self.kind {
            Kind::Message => json!({
                "id": self.id, "type": "message", "status": self.status, "role": "assistant", "content": parts,
            }),
            Kind::Reasoning => {
                let (summary, content) =
                    if style.thoughts.as_summary { (parts, Vec::new()) } else { (Vec::new(), parts) };
                let sealed = (style.thoughts.encrypted && with_parts).then(|| seal(&self.text));
                json!({
                    "id": self.id, "type": "reasoning", "status": self.status, "summary": summary, "content": content,
                    "encrypted_content": sealed,
                })
            }
            Kind::Call { call_id, name } => json!({
                "id": self.id, "type": "function_call", "status": self.status, "call_id": call_id, "name": name,
                "arguments": self.text,
            }),
        }
    }
}

fn usage_json(usage: &EngineUsage, reasoning_tokens: usize) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}
