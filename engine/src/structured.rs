//! What form an answer must have: asked here, compiled off the engine thread, enforced token by token.

use std::sync::Arc;

/// The form that a completion must have.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Structured {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under this JSON Schema, itself given as JSON text.
    JsonSchema(Arc<str>),
    /// Text that this regular expression matches whole (Rust's `regex` syntax without look-around and back-references).
    Regex(Arc<str>),
    /// One of these texts.
    Choice(Arc<[String]>),
    /// A grammar in the Lark dialect of llguidance. Grammars in EBNF (GBNF) are translated to it before they come here.
    Lark(Arc<str>),
}

/// How a reasoning model marks its thoughts. What is between the marks is free: [`Structured`] concerns what follows them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thinking {
    /// Begins the thoughts, such as `<think>`. The prompt may end with it; then the completion begins within the thoughts.
    pub start: String,
    /// Ends them, such as `</think>`.
    pub end: String,
    /// Tokens of thought after which the end is written for the model; `None` lets it think.
    pub budget: Option<u32>,
}
