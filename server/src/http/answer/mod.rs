//! An answer on its way to the client: outputs of the engine become text, thoughts and tool calls, whatever family asked.

pub mod asking;
pub mod parsers;

use std::sync::Arc;

use futures_util::StreamExt;
use tidemill_engine::{
    ids::{RequestId, TokenId},
    output::{FinishReason, MatchedStop, TokenLogprobs, Usage},
    request::GenerateRequest,
};

use self::parsers::{AnswerParser, ParserChoice, ParserConfig, Piece, ReasoningFormat, ToolFormat};
use crate::client::{Accepted, CallError, EngineClient, OutputStream};

/// How answers are read: `--tool-call-parser` and `--reasoning-parser`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Parsers {
    /// Tool calls.
    pub tools: ParserChoice<ToolFormat>,
    /// Thoughts.
    pub reasoning: ParserChoice<ReasoningFormat>,
}

impl Parsers {
    /// The formats of a model with this chat template.
    pub fn resolve(&self, template: Option<&str>) -> (Option<ToolFormat>, Option<ReasoningFormat>) {
        let (tools, reasoning) = template.map(parsers::detect).unwrap_or_default();
        (self.tools.resolve(tools), self.reasoning.resolve(reasoning))
    }
}

/// What a client asked, in neutral terms.
#[derive(Debug)]
pub struct Ask {
    /// For the engine.
    pub request: GenerateRequest,
    /// How to read the answer; `None` takes it as text.
    pub parser: Option<ParserConfig>,
    /// Only the first tool call counts.
    pub single_tool_call: bool,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub enum StopReason {
    /// The model ended its answer, or a stop token of the client's did.
    Stop,
    /// A stop string of the client's.
    StopString(String),
    /// A stop token of the client's.
    StopToken(u32),
    /// `max_tokens`.
    Length,
    /// The model called tools.
    ToolCalls,
    /// Somebody aborted the request.
    Abort,
}

impl StopReason {
    /// As OpenAI calls it.
    pub fn openai(&self) -> &'static str {
        match self {
            Self::Stop | Self::StopString(_) | Self::StopToken(_) => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::Abort => "abort",
        }
    }
}

/// What is new of one choice.
#[derive(Debug, Default)]
pub struct Step {
    /// Which choice.
    pub index: u32,
    /// Text, thoughts and calls.
    pub pieces: Vec<Piece>,
    /// One per new token, where asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Of the prompt, where asked for; on the first step of choice 0.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Ids of these tokens.
    pub token_ids: Vec<TokenId>,
    /// Tokens that came with it, also those whose text is still held back.
    pub new_tokens: usize,
    /// Present on the choice's last step.
    pub end: Option<(StopReason, Usage)>,
    /// Tokens of the choice's thoughts so far.
    pub reasoning_tokens: usize,
}

/// One request's answer. Dropping it before its end aborts the request.
pub struct Answer {
    /// The request's name in the engine.
    pub id: RequestId,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    outputs: OutputStream,
    choices: Vec<Choosing>,
    single_tool_call: bool,
}

/// One choice under way.
struct Choosing {
    parser: Option<AnswerParser>,
    calls: usize,
    tokens: usize,
    thinks: bool,
    reasoning_tokens: usize,
    done: bool,
}

impl Answer {
    /// Hands a request to the engine.
    ///
    /// # Errors
    /// Why it was not taken.
    pub async fn start(engine: &Arc<dyn EngineClient>, ask: Ask) -> Result<Self, CallError> {
        let n = ask.request.sampling.n.unwrap_or(1);
        let Accepted { id, prompt_tokens, opens_thinking, outputs } = engine.generate(ask.request).await?;
        let choosing = |_| {
            let parser = ask.parser.as_ref().map(|config| {
                AnswerParser::new(&ParserConfig { starts_in_reasoning: opens_thinking, ..config.clone() })
            });
            let thinks = parser.is_some() && opens_thinking;
            Choosing { parser, calls: 0, tokens: 0, thinks, reasoning_tokens: 0, done: false }
        };
        let choices = (0..n).map(choosing).collect();
        Ok(Self { id, prompt_tokens, outputs, choices, single_tool_call: ask.single_tool_call })
    }

    /// How many choices there are.
    pub fn choices(&self) -> u32 {
        self.choices.len() as u32
    }

    /// What is new; `None` after the last choice's end. An error is the last thing that comes.
    pub async fn next(&mut self) -> Option<Result<Step, CallError>> {
        loop {
            if self.choices.iter().all(|choice| choice.done) {
                return None;
            }
            let output = match self.outputs.next().await? {
                Ok(output) => output,
                Err(error) => {
                    self.choices.iter_mut().for_each(|choice| choice.done = true);
                    return Some(Err(error));
                }
            };
            let choice = &mut self.choices[output.index as usize];
            if choice.done {
                continue;
            }
            let new_tokens = output.token_ids.len();
            choice.tokens += new_tokens;
            let mut step = Step {
                index: output.index,
                logprobs: output.logprobs,
                prompt_logprobs: output.prompt_logprobs,
                token_ids: output.token_ids,
                new_tokens,
                ..Step::default()
            };
            let finish = output.finish;
            choice.read(output.text, finish.is_some(), &mut step.pieces);
            choice.count_thoughts(new_tokens, &step.pieces);
            step.reasoning_tokens = choice.reasoning_tokens;
            step.end = finish.map(|finish| (choice.reason(finish.reason, finish.matched_stop), finish.usage));
            if self.single_tool_call && choice.cut_second_call(&mut step.pieces) && step.end.is_none() {
                let usage = Usage {
                    prompt_tokens: self.prompt_tokens,
                    completion_tokens: choice.tokens,
                    ..Usage::default()
                };
                step.end = Some((StopReason::ToolCalls, usage));
            }
            choice.done = step.end.is_some();
            return Some(Ok(step));
        }
    }
}

impl Choosing {
    fn read(&mut self, text: String, ends: bool, pieces: &mut Vec<Piece>) {
        match &mut self.parser {
            Some(parser) => {
                parser.push(&text, pieces);
                if ends {
                    parser.finish(pieces);
                }
            }
            None if text.is_empty() => {}
            None => pieces.push(Piece::Text(text)),
        }
    }

    /// Counts tokens as thoughts from the first piece of thought to the first piece of anything else.
    fn count_thoughts(&mut self, new_tokens: usize, pieces: &[Piece]) {
        let is_thought = |piece: &Piece| matches!(piece, Piece::Reasoning(_));
        self.thinks |= pieces.iter().any(is_thought);
        if self.thinks {
            self.reasoning_tokens += new_tokens;
        }
        self.thinks &= pieces.iter().all(is_thought);
    }

    fn reason(&self, reason: FinishReason, matched: Option<MatchedStop>) -> StopReason {
        match (reason, matched) {
            (FinishReason::Length, _) => StopReason::Length,
            (FinishReason::Abort, _) => StopReason::Abort,
            (FinishReason::Stop, Some(MatchedStop::Text(text))) => StopReason::StopString(text),
            (FinishReason::Stop, _) if self.parser.as_ref().is_some_and(AnswerParser::called_tools) => {
                StopReason::ToolCalls
            }
            (FinishReason::Stop, Some(MatchedStop::Token(token))) => StopReason::StopToken(token.0),
            (FinishReason::Stop, None) => StopReason::Stop,
        }
    }

    /// Takes away what belongs to a second tool call. True when there was one.
    fn cut_second_call(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let mut calls = self.calls;
        let second = pieces.iter().position(|piece| {
            calls += usize::from(matches!(piece, Piece::ToolCallStart { .. }));
            calls > 1
        });
        self.calls = calls;
        second.inspect(|&at| pieces.truncate(at)).is_some()
    }
}
