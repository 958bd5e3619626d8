//! A completion's answer in OpenAI's shapes: one object, or chunks. Several prompts share one answer.

use std::sync::Arc;

use axum::response::Response;
use futures_util::{StreamExt, future::try_join_all, stream};
use serde::Serialize;
use serde_json::{Value, json};
use tidemill_engine::{
    ids::{RequestId, TokenId},
    output::Usage as EngineUsage,
    request::Prompt,
};

use crate::{
    client::{CallError, ModelCard, TokenizeInput},
    http::{
        ApiError, App,
        answer::{Answer, Step, parsers::Piece},
        app::Group,
        json_response,
        openai::{
            StreamOptions, Usage,
            chunks::{Head, stop_reason},
            logprobs::{self, CompletionLogprobs},
            stream_error,
        },
        sse,
    },
};

/// A prompt that stands before its answer.
#[derive(Debug, Clone)]
pub struct Echo {
    text: String,
    ids: Vec<TokenId>,
}

impl Echo {
    /// The prompt as text and as tokens.
    ///
    /// # Errors
    /// What is wrong with the prompt.
    pub async fn of(app: &App, prompt: &Prompt) -> Result<Self, CallError> {
        match prompt {
            Prompt::Text(text) => {
                let ids = app.engine.tokenize(TokenizeInput::Text(text.clone(), true)).await?.ids;
                Ok(Self { text: text.clone(), ids })
            }
            Prompt::TokenIds(ids) => {
                Ok(Self { text: app.engine.detokenize(ids.clone(), false).await?, ids: ids.clone() })
            }
            Prompt::Chat(_) => unreachable!("completions have no conversations"),
        }
    }
}

/// Writes the answer to one or several prompts.
pub struct CompletionWriter {
    head: Head,
    top_logprobs: Option<u32>,
    prompts: Vec<Writing>,
    /// Of each prompt.
    choices: usize,
    usage: Usage,
    group: Group,
    /// Ids stand beside the text.
    token_ids: bool,
    /// Chunks that are nothing but text.
    texts: sse::Templates,
}

/// One prompt's choices.
struct Writing {
    answer: Answer,
    echo: Option<Echo>,
    /// Of each choice, the characters of its text so far.
    offsets: Vec<usize>,
    prompt_logprobs: Vec<Value>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
    logprobs: Option<&'a CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
}

impl<'a> Choice<'a> {
    /// What is new of a choice, with this text.
    fn of(line: &'a Line, text: &'a str) -> Self {
        Self {
            index: line.index,
            text,
            token_ids: line.token_ids.as_deref(),
            logprobs: line.logprobs.as_ref(),
            finish_reason: line.end.as_ref().map(|end| end.0),
            stop_reason: line.end.as_ref().and_then(|end| end.1.clone()),
        }
    }
}

impl CompletionWriter {
    /// A writer for these answers.
    pub fn new(
        id: &RequestId,
        card: Arc<ModelCard>,
        top_logprobs: Option<u32>,
        answers: Vec<(Answer, Option<Echo>)>,
        group: Group,
    ) -> Self {
        let mut usage = Usage::default();
        answers.iter().for_each(|(answer, _)| usage.merge(&Usage::of_prompt(answer.prompt_tokens)));
        let writing = |(answer, echo): (Answer, Option<Echo>)| Writing {
            offsets: vec![0; answer.choices() as usize],
            answer,
            echo,
            prompt_logprobs: Vec::new(),
        };
        let choices = answers.first().map_or(1, |(answer, _)| answer.choices() as usize);
        let prompts = answers.into_iter().map(writing).collect();
        let head = Head::new(format!("cmpl-{id}"), "text_completion", card);
        let texts = sse::Templates::default();
        Self { head, top_logprobs, prompts, choices, usage, group, token_ids: false, texts }
    }

    /// Whether ids stand beside the text.
    pub fn with_token_ids(self, token_ids: bool) -> Self {
        Self { token_ids, ..self }
    }

    /// The answers as chunks, in the order in which they come.
    pub fn stream(mut self, options: StreamOptions) -> Response {
        let prompts = std::mem::take(&mut self.prompts);
        let choices = self.choices;
        let card = self.head.card.clone();
        let how = How { top: self.top_logprobs, token_ids: self.token_ids };
        let steps = stream::select_all(prompts.into_iter().enumerate().map(move |(at, writing)| {
            let card = card.clone();
            Box::pin(stream::unfold(Some(writing), move |writing| {
                let card = card.clone();
                async move {
                    let mut writing = writing?;
                    let step = writing.answer.next().await?;
                    let line = step.map(|step| writing.line(&card, how, step, at * choices));
                    let writing = line.is_ok().then_some(writing);
                    Some((line, writing))
                }
            }))
        }));
        let lines = steps.map(Some).chain(stream::iter([None]));
        sse::response(lines.scan((self, false), move |(writer, failed), line| {
            let mut buffer = Vec::with_capacity(256);
            let over = *failed;
            match line {
                _ if over => {}
                Some(Ok(line)) => writer.line(&mut buffer, &line, options),
                Some(Err(error)) => {
                    *failed = true;
                    sse::data(&mut buffer, &stream_error(error));
                    sse::done(&mut buffer);
                }
                None => {
                    writer.head.end(&mut buffer, writer.usage, options);
                }
            }
            std::future::ready((!over).then_some(buffer))
        }))
    }

    fn line(&mut self, buffer: &mut Vec<u8>, line: &Line, options: StreamOptions) {
        self.count(line);
        let has_ids = line.token_ids.as_ref().is_some_and(|ids| !ids.is_empty());
        if line.text.is_empty() && line.logprobs.is_none() && line.end.is_none() && !has_ids {
            return;
        }
        if line.logprobs.is_none()
            && line.end.is_none()
            && line.token_ids.is_none()
            && !options.continuous_usage_stats
        {
            let mut texts = std::mem::take(&mut self.texts);
            texts.write(buffer, line.index, &line.text, |buffer, text| {
                self.choice(buffer, Choice::of(line, text), options);
            });
            self.texts = texts;
            return;
        }
        self.choice(buffer, Choice::of(line, &line.text), options);
    }

    fn choice(&self, buffer: &mut Vec<u8>, choice: Choice<'_>, options: StreamOptions) {
        self.head.choice(buffer, choice, self.usage, options);
    }

    fn count(&mut self, line: &Line) {
        self.usage.add(line.new_tokens);
        if let Some((_, _, usage)) = &line.end {
            self.usage.end(usage, line.index.is_multiple_of(self.choices), 0);
        }
    }

    /// The answers in one piece.
    ///
    /// # Errors
    /// Why the engine could not finish one of them.
    pub async fn whole(mut self) -> Result<Response, ApiError> {
        let card = self.head.card.clone();
        let how = How { top: self.top_logprobs, token_ids: self.token_ids };
        let mut first = 0;
        let collected = std::mem::take(&mut self.prompts).into_iter().map(|writing| {
            let begins = first;
            first += writing.answer.choices() as usize;
            writing.collect(&card, how, begins)
        });
        let mut choices = Vec::new();
        // Side by side: an answer that is not read is parked.
        for (lines, prompt_logprobs) in try_join_all(collected).await? {
            let mut prompt_logprobs = Some(prompt_logprobs).filter(|list| !list.is_empty());
            for line in lines {
                self.count(&line);
                let (finish_reason, stop_reason, _) = line.end.unwrap_or_default();
                let mut choice = json!({
                    "index": line.index,
                    "text": line.text,
                    "logprobs": line.logprobs,
                    "finish_reason": finish_reason,
                    "stop_reason": stop_reason,
                });
                if let Some(ids) = line.token_ids {
                    choice["token_ids"] = ids.into();
                }
                if let Some(logprobs) = prompt_logprobs.take() {
                    choice["prompt_logprobs"] = logprobs.into();
                }
                choices.push(choice);
            }
        }
        drop(self.group);
        Ok(json_response(&json!({
            "id": self.head.id,
            "object": "text_completion",
            "created": self.head.created,
            "model": self.head.card.served_model_name,
            "choices": choices,
            "usage": self.usage,
        })))
    }
}

/// What is said of each token.
#[derive(Debug, Clone, Copy)]
struct How {
    /// So many alternatives.
    top: Option<u32>,
    /// Its id.
    token_ids: bool,
}

/// What is new of one choice.
#[derive(Default)]
struct Line {
    index: usize,
    text: String,
    /// Where asked for.
    token_ids: Option<Vec<u32>>,
    logprobs: Option<CompletionLogprobs>,
    new_tokens: usize,
    end: Option<(&'static str, Option<Value>, EngineUsage)>,
}

impl Line {
    fn append(&mut self, line: Self) {
        self.text.push_str(&line.text);
        self.new_tokens += line.new_tokens;
        match (&mut self.token_ids, line.token_ids) {
            (Some(all), Some(more)) => all.extend(more),
            (all, more) => *all = all.take().or(more),
        }
        match (&mut self.logprobs, line.logprobs) {
            (Some(all), Some(more)) => all.append(more),
            (all, more) => *all = all.take().or(more),
        }
        self.end = self.end.take().or(line.end);
    }
}

impl Writing {
    /// All of its choices, numbered from `first` on, and what is said of the prompt.
    async fn collect(
        mut self,
        card: &ModelCard,
        how: How,
        first: usize,
    ) -> Result<(Vec<Line>, Vec<Value>), CallError> {
        let count = self.answer.choices() as usize;
        let mut lines: Vec<Line> =
            (0..count).map(|at| Line { index: first + at, ..Line::default() }).collect();
        while let Some(step) = self.answer.next().await {
            let line = self.line(card, how, step?, first);
            let at = line.index - first;
            lines[at].append(line);
        }
        Ok((lines, self.prompt_logprobs))
    }

    fn line(&mut self, card: &ModelCard, how: How, step: Step, first: usize) -> Line {
        let top = how.top;
        let at = step.index as usize;
        let mut line = Line { index: first + at, new_tokens: step.new_tokens, ..Line::default() };
        line.token_ids = how.token_ids.then(|| step.token_ids.iter().map(|id| id.0).collect());
        let mut logprobs = top.map(|_| CompletionLogprobs::default());
        let offset = &mut self.offsets[at];
        let begins = std::mem::take(offset);
        // The prompt comes with the choice's first step; an offset of 0 is the mark, so what has begun counts from 1.
        if let (0, Some(echo)) = (begins, &self.echo) {
            line.text.push_str(&echo.text);
            if let Some(logprobs) = &mut logprobs {
                let mut place = 0;
                echo.ids.first().inspect(|&&id| logprobs.push_bare(card, id, &mut place));
                let scored = step.prompt_logprobs.iter();
                scored.for_each(|entry| logprobs.push(card, entry, top.unwrap_or(0), &mut place));
            }
        }
        let mut place = match begins {
            0 => line.text.chars().count(),
            begun => begun - 1,
        };
        if let (Some(logprobs), Some(top)) = (&mut logprobs, top) {
            step.logprobs.iter().for_each(|entry| logprobs.push(card, entry, top, &mut place));
        }
        *offset = place + 1;
        if !step.prompt_logprobs.is_empty() {
            self.prompt_logprobs = logprobs::prompt(card, &step.prompt_logprobs);
        }
        for piece in step.pieces {
            if let Piece::Text(text) = piece {
                line.text.push_str(&text);
            }
        }
        line.logprobs = logprobs.filter(|list| !list.is_empty());
        line.end = step.end.map(|(reason, usage)| (reason.openai(), stop_reason(&reason), usage));
        line
    }
}
