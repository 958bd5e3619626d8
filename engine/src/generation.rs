//! The caller's side of one request: events of the engine become text and token deltas.
//!
//! Detokenising and stop strings live here, off the engine thread. A stop string ends its completion by a command to the
//! engine, whose answer carries the usage.

use std::{sync::Arc, time::Instant};

use async_channel::Receiver;

use crate::{
    core::Command,
    error::RequestError,
    event::Event,
    handle::EngineHandle,
    ids::{RequestId, Ticket, TokenId},
    output::{Finish, FinishReason, MatchedStop, Output, TokenLogprobs},
    request::ValidatedRequest,
    text::{detokenize::Detokenizer, stop::StopMatcher},
    unread::Unread,
};

/// One completion's text.
#[derive(Debug)]
struct Completion {
    /// `None` when only ids are wanted.
    text: Option<(Detokenizer, StopMatcher)>,
    tokens: usize,
    /// The stop string that ended it, while the engine's acknowledgement is under way.
    stopped: Option<String>,
    done: bool,
}

/// What the engine thread sends a request's events through.
#[derive(Debug)]
pub(crate) struct Stream {
    pub ticket: Ticket,
    pub events: Receiver<Event>,
    pub unread: Arc<Unread>,
}

/// The stream of one request's outputs. Dropping it before its end aborts the request.
#[derive(Debug)]
pub struct Generation {
    id: RequestId,
    stream: Stream,
    handle: EngineHandle,
    completions: Vec<Completion>,
    min_tokens: usize,
    /// Prompt log-probabilities that wait for the first output of completion 0.
    prompt_logprobs: Vec<TokenLogprobs>,
    over: bool,
}

impl Generation {
    pub(crate) fn new(request: &ValidatedRequest, stream: Stream, handle: EngineHandle) -> Self {
        let completion = |_| Completion {
            text: request.text_output.then(|| {
                let detokenizer = handle.text().detokenizer(request.include_special_tokens);
                (detokenizer, StopMatcher::new(request.stop.clone()))
            }),
            tokens: 0,
            stopped: None,
            done: false,
        };
        Self {
            id: request.id.clone(),
            stream,
            completions: (0..request.n).map(completion).collect(),
            min_tokens: request.sampling.min_tokens,
            prompt_logprobs: Vec::new(),
            over: false,
            handle,
        }
    }

    /// The request's id.
    pub fn id(&self) -> &RequestId {
        &self.id
    }

    /// The next output; `None` after the last one of the last completion. An error is the last thing a stream gives.
    pub async fn next(&mut self) -> Option<Result<Output, RequestError>> {
        while !self.over {
            let event = self.stream.events.recv().await.unwrap_or_else(|_| self.engine_gone());
            if let Some(output) = self.accept(event) {
                return Some(output);
            }
        }
        None
    }

    /// [`next`](Self::next) for callers without an async runtime.
    pub fn next_blocking(&mut self) -> Option<Result<Output, RequestError>> {
        while !self.over {
            let event = self.stream.events.recv_blocking().unwrap_or_else(|_| self.engine_gone());
            if let Some(output) = self.accept(event) {
                return Some(output);
            }
        }
        None
    }

    fn engine_gone(&self) -> Event {
        Event::Failed(self.handle.stop_reason().error())
    }

    fn accept(&mut self, event: Event) -> Option<Result<Output, RequestError>> {
        let (index, token, finish) = match event {
            Event::Failed(error) => {
                self.over = true;
                return Some(Err(error));
            }
            Event::PromptLogprobs(logprobs) => {
                self.prompt_logprobs.extend(logprobs);
                return None;
            }
            Event::Token { index, token, logprobs, finish } => {
                if self.stream.unread.taken() {
                    // Fails only when the engine is gone, which closes the events too.
                    drop(self.handle.commands.send(Command::Resume { ticket: self.stream.ticket }));
                }
                (index, Some((token, logprobs)), finish)
            }
            Event::Finished { index, finish } => (index, None, Some(finish)),
            Event::Embedding { .. } => {
                self.over = true;
                return Some(Err(RequestError::Internal("an embedding for a generation".into())));
            }
        };
        let completion = &mut self.completions[index as usize];
        let mut output = Output {
            index,
            text: String::new(),
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            finish: None,
        };
        let stopped_before = completion.stopped.is_some();
        match token {
            // Tokens that were on their way when the stop string matched are not part of the completion.
            Some(_) if stopped_before && finish.is_none() => return None,
            Some((token, logprobs)) if !stopped_before => {
                // The text of a token that ends the completion is not part of it.
                let ends = finish.as_ref().is_some_and(|finish| finish.reason == FinishReason::Stop);
                completion.push(token, !ends, self.min_tokens, &mut output);
                output.logprobs.extend(logprobs);
            }
            _ => {}
        }
        match finish {
            Some(finish) => {
                output.finish = Some(completion.end(finish, &mut output.text));
                self.over = self.completions.iter().all(|completion| completion.done);
            }
            None if completion.stopped.is_some() => {
                // Its answer is the completion's end, with the usage. A send fails only when the engine is gone, which
                // closes the events too.
                drop(self.handle.commands.send(Command::Stop { ticket: self.stream.ticket, index }));
            }
            None => {}
        }
        if index == 0 {
            output.prompt_logprobs = std::mem::take(&mut self.prompt_logprobs);
        }
        Some(Ok(output))
    }
}

impl Completion {
    /// Takes a new token in; what it adds goes to `output`.
    fn push(&mut self, token: TokenId, visible: bool, min_tokens: usize, output: &mut Output) {
        self.tokens += 1;
        output.token_ids.push(token);
        let Some((detokenizer, stops)) = self.text.as_mut().filter(|_| visible) else { return };
        let text = detokenizer.push(token);
        if self.tokens < min_tokens {
            output.text = text;
        } else {
            let step = stops.push(&text);
            output.text = step.emit;
            self.stopped = step.matched;
        }
    }

    /// Ends the completion: what was held back goes to `text`, unless a stop string has been or is now found.
    fn end(&mut self, mut finish: Finish, text: &mut String) -> Finish {
        self.done = true;
        if let Some((detokenizer, stops)) = self.text.as_mut().filter(|_| self.stopped.is_none()) {
            let step = stops.push(&detokenizer.finish());
            text.push_str(&step.emit);
            match step.matched {
                Some(stop) => self.stopped = Some(stop),
                None => text.push_str(&stops.finish()),
            }
        }
        if let Some(stop) = self.stopped.take() {
            finish.reason = FinishReason::Stop;
            finish.matched_stop = Some(MatchedStop::Text(stop));
        }
        finish.usage.completion_tokens = self.tokens;
        finish
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.over {
            // Fails only when the engine is gone, and everything with it.
            let (ticket, received) = (self.stream.ticket, Instant::now());
            drop(self.handle.commands.send(Command::Drop { ticket, received }));
        }
    }
}
