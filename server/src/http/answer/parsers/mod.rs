//! Reads what a model writes: thoughts, text and tool calls, streamed and the same however the text was cut.
//!
//! Everything here works on text alone. [`AnswerParser`] is a machine that takes one character at a time, so its
//! output cannot depend on where the engine cut the text. It holds back only what may be the beginning of a marker,
//! white space that may lead to a tool call, and a call whose tool is not known yet; each character is looked at a
//! bounded number of times, so that long arguments cost linear time.
//!
//! - [`AnswerParser`]: reasoning (`reasoning`) and tool calls (`tools`, `envelope`, `pythonic`, `named`);
//! - [`detect`], [`ToolFormat`], [`ReasoningFormat`], [`ParserChoice`]: which format a model writes (`formats`);
//! - [`tool_grammar`]: grammars that make a model call a tool (`grammar`, `python_grammar`);
//! - [`lark_from_grammar`]: grammars in EBNF, as llama.cpp and vLLM take them (`ebnf`).

mod ebnf;
mod envelope;
mod formats;
mod grammar;
mod markers;
mod named;
mod python_grammar;
mod pythonic;
mod reasoning;
mod scan;
#[cfg(test)]
mod tests;
mod tools;

use std::sync::Arc;

pub use self::{
    ebnf::lark_from_grammar,
    formats::{ParserChoice, ReasoningFormat, ToolFormat, UnknownParser, detect},
    grammar::{ToolChoice, ToolDef, ToolGrammar, tool_grammar},
};
use self::{reasoning::Thoughts, tools::ToolReader};

/// A part of an answer, in the order in which the model wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Thought, without the marks around it.
    Reasoning(String),
    /// The answer itself, and whatever looked like a tool call and was none.
    Text(String),
    /// A call of a known tool begins; its arguments follow.
    ToolCallStart {
        /// Position among the answer's calls, from 0.
        index: usize,
        /// A new id, in the style of the format (`call_` and 24 characters; Mistral: 9 characters).
        id: String,
        /// The tool.
        name: String,
    },
    /// More of a call's arguments. All fragments of one call together are the JSON text of the arguments' object as
    /// the model wrote it; of an answer that was cut short, or whose arguments are bad JSON, it is what there is.
    ToolCallArguments {
        /// The call that the fragment belongs to.
        index: usize,
        /// JSON text.
        fragment: String,
    },
}

/// What an [`AnswerParser`] looks for.
#[derive(Debug, Clone, Default)]
pub struct ParserConfig {
    /// How the model marks its thoughts; `None` takes everything as text.
    pub reasoning: Option<ReasoningFormat>,
    /// Whether the prompt already began the thoughts, so that the answer begins within them.
    pub starts_in_reasoning: bool,
    /// How the model calls tools; `None`, or no names, leaves calls in the text.
    pub tools: Option<ToolFormat>,
    /// Names of the request's tools. A call of anything else stays text.
    pub tool_names: Arc<[String]>,
    /// Special tokens' text, which never reaches the client as text, for requests that ask the engine for special
    /// tokens because the formats' marks are among them.
    pub special_tokens: Arc<[String]>,
}

/// Splits one answer into [`Piece`]s while it is generated.
///
/// Nothing that the model wrote is lost, except the marks themselves and white space beside a call: what cannot be
/// read as a call of a known tool comes out as text. Once a call has begun ([`Piece::ToolCallStart`]) it cannot be taken
/// back: its arguments then stream as the model writes them, even where they turn out to be bad JSON.
#[derive(Debug)]
pub struct AnswerParser {
    thoughts: Thoughts,
    tools: ToolReader,
}

impl AnswerParser {
    /// A parser for one choice of one answer.
    pub fn new(config: &ParserConfig) -> Self {
        Self { thoughts: Thoughts::new(config), tools: ToolReader::new(config) }
    }

    /// Takes the next text of the answer and appends what is certain by now. A piece of the same kind as the last one
    /// of `pieces` is joined to it.
    pub fn push(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        let out = &mut Sink(pieces);
        for c in text.chars() {
            self.thoughts.step(c, &mut self.tools, out);
        }
    }

    /// Ends the answer: what was held back comes out as what it is now known to be.
    pub fn finish(&mut self, pieces: &mut Vec<Piece>) {
        let out = &mut Sink(pieces);
        self.thoughts.finish(&mut self.tools, out);
        self.tools.finish(out);
    }

    /// Whether the answer called a tool so far (`finish_reason` is then "tool_calls").
    pub fn called_tools(&self) -> bool {
        self.tools.calls() > 0
    }
}

/// Appends to a list of pieces, joining neighbours of the same kind.
struct Sink<'a>(&'a mut Vec<Piece>);

impl Sink<'_> {
    fn text(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Piece::Text(last)) => last.push_str(text),
            _ => self.0.push(Piece::Text(text.to_owned())),
        }
    }

    fn reasoning(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Piece::Reasoning(last)) => last.push_str(text),
            _ => self.0.push(Piece::Reasoning(text.to_owned())),
        }
    }

    fn start(&mut self, index: usize, id: String, name: String) {
        self.0.push(Piece::ToolCallStart { index, id, name });
    }

    fn arguments(&mut self, index: usize, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Piece::ToolCallArguments { index: last, fragment }) if *last == index => {
                fragment.push_str(text)
            }
            _ => self.0.push(Piece::ToolCallArguments { index, fragment: text.to_owned() }),
        }
    }
}

/// A character as text, without an allocation.
fn text_of(c: char, buffer: &mut [u8; 4]) -> &str {
    c.encode_utf8(buffer)
}
