//! A chat's answer in OpenAI's shapes: one object, or chunks.

use std::sync::Arc;

use axum::response::Response;
use futures_util::stream;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    client::ModelCard,
    http::{
        ApiError,
        answer::{Answer, Step, StopReason, parsers::Piece},
        json_response,
        openai::{
            StreamOptions, Usage,
            chunks::{Head, stop_reason},
            logprobs::{self, ChatLogprob},
            stream_error,
        },
        sse,
    },
};

/// Writes one chat's answer.
pub struct ChatWriter {
    answer: Answer,
    head: Head,
    top_logprobs: Option<u32>,
    include_reasoning: bool,
    usage: Usage,
    /// Chunks that are nothing but text.
    texts: sse::Templates,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<Content<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
}

#[derive(Serialize)]
struct Content<'a> {
    content: &'a [ChatLogprob],
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta<'a>; 1]>,
}

#[derive(Serialize)]
struct CallDelta<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl<'a> ChunkChoice<'a> {
    /// A choice that goes on.
    fn of(index: u32, delta: Delta<'a>, logprobs: Option<Content<'a>>) -> Self {
        Self { index, delta, logprobs, finish_reason: None, stop_reason: None }
    }
}

impl<'a> Delta<'a> {
    fn of(piece: &'a Piece) -> Self {
        let call = |index, id, kind, name, arguments| {
            Some([CallDelta { index, id, kind, function: FunctionDelta { name, arguments } }])
        };
        match piece {
            Piece::Text(text) => Self { content: Some(text), ..Self::default() },
            Piece::Reasoning(text) => Self { reasoning_content: Some(text), ..Self::default() },
            Piece::ToolCallStart { index, id, name } => Self {
                tool_calls: call(*index, Some(id.as_str()), Some("function"), Some(name.as_str()), ""),
                ..Self::default()
            },
            Piece::ToolCallArguments { index, fragment } => {
                Self { tool_calls: call(*index, None, None, None, fragment.as_str()), ..Self::default() }
            }
        }
    }
}

impl ChatWriter {
    /// A writer for this answer.
    pub fn new(
        answer: Answer,
        card: Arc<ModelCard>,
        top_logprobs: Option<u32>,
        include_reasoning: bool,
    ) -> Self {
        let head = Head::new(format!("chatcmpl-{}", answer.id), "chat.completion.chunk", card);
        let usage = Usage::of_prompt(answer.prompt_tokens);
        let texts = sse::Templates::default();
        Self { answer, head, top_logprobs, include_reasoning, usage, texts }
    }

    /// The answer as chunks.
    pub fn stream(self, options: StreamOptions) -> Response {
        let state = (Some(self), true);
        sse::response(stream::unfold(state, move |(writer, first)| async move {
            let mut writer = writer?;
            let mut buffer = Vec::with_capacity(256);
            let step = if first { None } else { Some(writer.answer.next().await) };
            let goes_on = match step {
                // The role goes out before the first token is there: clients see that they were taken.
                None => {
                    let choices = writer.answer.choices();
                    (0..choices).for_each(|index| writer.role(&mut buffer, index, options));
                    true
                }
                Some(Some(Ok(step))) => {
                    writer.step(&mut buffer, step, options);
                    true
                }
                Some(Some(Err(error))) => {
                    sse::data(&mut buffer, &stream_error(error));
                    sse::done(&mut buffer);
                    false
                }
                Some(None) => {
                    writer.head.end(&mut buffer, writer.usage, options);
                    false
                }
            };
            Some((buffer, (goes_on.then_some(writer), false)))
        }))
    }

    fn role(&self, buffer: &mut Vec<u8>, index: u32, options: StreamOptions) {
        let delta = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
        self.choice(buffer, ChunkChoice::of(index, delta, None), options);
    }

    fn step(&mut self, buffer: &mut Vec<u8>, step: Step, options: StreamOptions) {
        self.count(&step);
        let logprobs = self.top_logprobs.map(|top| logprobs::chat(&self.head.card, &step.logprobs, top));
        let mut owed = logprobs.as_deref().filter(|list| !list.is_empty());
        let index = step.index;
        for piece in &step.pieces {
            if matches!(piece, Piece::Reasoning(_)) && !self.include_reasoning {
                continue;
            }
            if let (Piece::Text(text), None) = (piece, owed)
                && !options.continuous_usage_stats
            {
                self.text(buffer, index, text, options);
                continue;
            }
            let logprobs = owed.take().map(|content| Content { content });
            self.choice(buffer, ChunkChoice::of(index, Delta::of(piece), logprobs), options);
        }
        let logprobs = owed.take().map(|content| Content { content });
        if step.end.is_some() || logprobs.is_some() {
            let finish_reason = step.end.as_ref().map(|(reason, _)| reason.openai());
            let stop_reason = step.end.as_ref().and_then(|(reason, _)| stop_reason(reason));
            let choice = ChunkChoice { index, delta: Delta::default(), logprobs, finish_reason, stop_reason };
            self.choice(buffer, choice, options);
        }
    }

    /// Most chunks by far.
    fn text(&mut self, buffer: &mut Vec<u8>, index: u32, text: &str, options: StreamOptions) {
        let mut texts = std::mem::take(&mut self.texts);
        texts.write(buffer, index as usize, text, |buffer, text| {
            let delta = Delta { content: Some(text), ..Delta::default() };
            self.choice(buffer, ChunkChoice::of(index, delta, None), options);
        });
        self.texts = texts;
    }

    fn count(&mut self, step: &Step) {
        self.usage.add(step.new_tokens);
        if let Some((_, usage)) = &step.end {
            self.usage.end(usage, step.index == 0, step.reasoning_tokens);
        }
    }

    fn choice(&self, buffer: &mut Vec<u8>, choice: ChunkChoice<'_>, options: StreamOptions) {
        self.head.choice(buffer, choice, self.usage, options);
    }

    /// The answer in one piece.
    ///
    /// # Errors
    /// Why the engine could not finish it.
    pub async fn whole(mut self) -> Result<Response, ApiError> {
        let mut choices: Vec<Whole> = (0..self.answer.choices()).map(|_| Whole::default()).collect();
        let mut prompt_logprobs = None;
        while let Some(step) = self.answer.next().await {
            let step = step?;
            self.count(&step);
            if !step.prompt_logprobs.is_empty() {
                prompt_logprobs = Some(logprobs::prompt(&self.head.card, &step.prompt_logprobs));
            }
            let choice = &mut choices[step.index as usize];
            if let Some(top) = self.top_logprobs {
                choice.logprobs.extend(logprobs::chat(&self.head.card, &step.logprobs, top));
            }
            step.pieces.into_iter().for_each(|piece| choice.piece(piece));
            choice.end = step.end.map(|(reason, _)| reason).or(choice.end.take());
        }
        let choices: Vec<Value> = choices
            .into_iter()
            .enumerate()
            .map(|(index, choice)| choice.json(index, self.top_logprobs.is_some(), self.include_reasoning))
            .collect();
        let mut answer = json!({
            "id": self.head.id,
            "object": "chat.completion",
            "created": self.head.created,
            "model": self.head.card.served_model_name,
            "choices": choices,
            "usage": self.usage,
        });
        if let Some(logprobs) = prompt_logprobs {
            answer["prompt_logprobs"] = logprobs.into();
        }
        Ok(json_response(&answer))
    }
}

/// A choice that is collected.
#[derive(Default)]
struct Whole {
    text: String,
    reasoning: String,
    calls: Vec<WholeCall>,
    logprobs: Vec<ChatLogprob>,
    end: Option<StopReason>,
}

struct WholeCall {
    id: String,
    name: String,
    arguments: String,
}

impl Whole {
    fn piece(&mut self, piece: Piece) {
        match piece {
            Piece::Text(text) => self.text.push_str(&text),
            Piece::Reasoning(text) => self.reasoning.push_str(&text),
            Piece::ToolCallStart { id, name, .. } => {
                self.calls.push(WholeCall { id, name, arguments: String::new() });
            }
            Piece::ToolCallArguments { index, fragment } => {
                if let Some(call) = self.calls.get_mut(index) {
                    call.arguments.push_str(&fragment);
                }
            }
        }
    }

    fn json(self, index: usize, logprobs: bool, include_reasoning: bool) -> Value {
        let empty = self.text.is_empty() && !self.calls.is_empty();
        let content = if empty { Value::Null } else { self.text.into() };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if include_reasoning && !self.reasoning.is_empty() {
            message["reasoning_content"] = self.reasoning.into();
        }
        if !self.calls.is_empty() {
            let call = |call: WholeCall| json!({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}});
            message["tool_calls"] = self.calls.into_iter().map(call).collect();
        }
        let end = self.end.unwrap_or(StopReason::Abort);
        json!({
            "index": index,
            "message": message,
            "logprobs": logprobs.then(|| json!({"content": self.logprobs})),
            "finish_reason": end.openai(),
            "stop_reason": stop_reason(&end),
        })
    }
}
