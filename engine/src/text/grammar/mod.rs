//! The forms of answers: from [`Structured`] and [`Thinking`] to what each next token may be.
//!
//! [`Forms`] compiles on the caller's side and keeps what it compiled. What comes out is a [`Constraint`] in its first state, one for each completion;
//! the scheduler leads it along. Grammars are llguidance's: an Earley parser over a lexer of derivatives, and a trie of the model's tokens.

mod cache;
mod compile;
mod matcher;
mod source;
mod thoughts;
mod tokens;

use std::sync::{Arc, OnceLock};

use cache::{Cache, Refusal};
use compile::Compiler;
use matcher::Grammar;
use thoughts::{HowToThink, Marks, Thoughts};
use tokens::Tokens;

use crate::{
    constraint::Constraint,
    error::RequestError,
    ids::TokenId,
    structured::{Structured, Thinking},
    text::TextModel,
};

/// What is asked of the completions of one request.
#[derive(Debug, Clone, Copy)]
pub struct FormRequest<'a> {
    /// The form of the answer.
    pub structured: Option<&'a Structured>,
    /// How thoughts before it are marked.
    pub thinking: Option<&'a Thinking>,
    /// Ids of the prompt.
    pub prompt: &'a [TokenId],
    /// Tokens to which there is no alternative are written without asking the model, who then says nothing about them.
    pub jump_ahead: bool,
}

/// What was made of it.
#[derive(Debug)]
pub struct Form {
    /// Where a completion begins; none where its tokens are free.
    pub constraint: Option<Box<dyn Constraint>>,
    /// The prompt ends within thoughts.
    pub opens_thinking: bool,
}

/// Compiles forms for one model, and keeps what was compiled for requests to come.
#[derive(Debug)]
pub struct Forms {
    text: Arc<TextModel>,
    eos_token_ids: Vec<TokenId>,
    /// Made when it is first needed: a large vocabulary takes a second.
    compiler: OnceLock<Result<Compiler, String>>,
    grammars: Cache<Structured, Grammar>,
    marks: Cache<[String; 2], Marks>,
}

impl Forms {
    /// For a model whose completions end with these tokens.
    pub fn new(text: Arc<TextModel>, eos_token_ids: Vec<TokenId>) -> Self {
        Self {
            text,
            eos_token_ids,
            compiler: OnceLock::new(),
            grammars: Cache::default(),
            marks: Cache::default(),
        }
    }

    /// Compiles what a request asks, or takes what was compiled for one that asked the same. Takes milliseconds as a rule and seconds at most: not for a
    /// thread that must stay responsive.
    ///
    /// # Errors
    /// [`RequestError::Invalid`] on `structured` or `thinking`; [`RequestError::CompilerBusy`].
    pub fn compile(&self, request: FormRequest<'_>) -> Result<Form, RequestError> {
        let marks = request.thinking.map(|thinking| self.marks(thinking)).transpose()?;
        let grammar = request.structured.map(|structured| self.grammar(structured)).transpose()?;
        let grammar = grammar.map(|grammar| grammar.begin(request.jump_ahead));
        let Some((thinking, marks)) = request.thinking.zip(marks) else {
            return Ok(Form { constraint: grammar, opens_thinking: false });
        };
        let opening = marks.opening(&self.text, request.prompt);
        let how = HowToThink { budget: thinking.budget, opening, jump_ahead: request.jump_ahead };
        let thoughts = Thoughts::new(marks, how, grammar);
        Ok(Form { constraint: thoughts.constraint(), opens_thinking: opening.is_open() })
    }

    fn grammar(&self, structured: &Structured) -> Result<Arc<Grammar>, RequestError> {
        let invalid = |message| RequestError::invalid("structured", message);
        source::check(structured).map_err(invalid)?;
        let compiler = self
            .compiler
            .get_or_init(|| Tokens::new(&self.text, &self.eos_token_ids).and_then(Compiler::new))
            .as_ref()
            .map_err(|error| invalid(format!("this model's tokens cannot be constrained: {error}")))?;
        let compile = || compiler.compile(structured);
        let compiled = self.grammars.get_or_make(structured, source::bytes(structured), compile);
        compiled.map_err(|refusal| refused("structured", refusal))
    }

    fn marks(&self, thinking: &Thinking) -> Result<Arc<Marks>, RequestError> {
        let key = [thinking.start.clone(), thinking.end.clone()];
        let make = || Ok(Marks::new(thinking, &self.text, &self.eos_token_ids)?);
        let bytes = thinking.start.len() + thinking.end.len();
        self.marks.get_or_make(&key, bytes, make).map_err(|refusal| refused("thinking", refusal))
    }
}

fn refused(field: &'static str, refusal: Refusal) -> RequestError {
    match refusal {
        Refusal::Final(message) => RequestError::invalid(field, message),
        Refusal::Busy => RequestError::CompilerBusy,
    }
}
