//! From a conversation, its tools and what it says about thoughts to a request of the engine and a way to read the answer.

use serde_json::Value;
use tidemill_engine::{
    request::{GenerateRequest, Prompt},
    structured::{Structured, Thinking},
};

use super::{
    Ask,
    parsers::{ParserConfig, ToolChoice, ToolDef, ToolFormat, ToolGrammar, tool_grammar},
};
use crate::{client::ModelCard, http::ApiError};

/// Most tools of a request.
const MAX_TOOLS: usize = 128;
/// Longest name of a tool, as OpenAI has it.
const MAX_NAME: usize = 64;

/// Whether the model is to call tools.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ToolMode {
    /// No.
    #[default]
    Off,
    /// As it sees fit.
    Auto,
    /// It must call one.
    Required,
    /// It must call this one.
    Named(String),
}

/// The tools of a request, whatever its family.
#[derive(Debug, Clone, Default)]
pub struct Tools {
    /// In OpenAI's form: `{"type": "function", "function": {"name", "description", "parameters"}}`.
    pub definitions: Vec<Value>,
    /// Whether to call them.
    pub mode: ToolMode,
    /// Whether several may be called in one answer.
    pub parallel: bool,
}

/// A request for an answer to `request`'s conversation. `budget` is how many tokens the model may think, where it does.
///
/// # Errors
/// 400 for tools that are malformed, or that this model cannot be given.
pub fn ask(
    card: &ModelCard,
    mut request: GenerateRequest,
    tools: Tools,
    budget: Option<u32>,
) -> Result<Ask, ApiError> {
    let names = check(&tools)?;
    let format = match (&tools.mode, card.tool_format) {
        (ToolMode::Off, _) => None,
        (ToolMode::Auto, None) => {
            return Err(ApiError::invalid(
                "tool_choice",
                "\"auto\" needs a model whose way of calling tools is known; start the server with --tool-call-parser, or \
                 send tool_choice \"required\" or \"none\"",
            ));
        }
        // Whatever the model was trained on, it can be made to write plain JSON.
        (_, known) => Some(known.unwrap_or(ToolFormat::Json)),
    };
    if let Some(format) = format {
        if let Some(grammar) = grammar(card, format, &tools)? {
            if request.structured.is_some() {
                return Err(ApiError::invalid(
                    "tool_choice",
                    "an answer that must be a tool call cannot have a form of its own; leave response_format out",
                ));
            }
            request.structured = Some(Structured::Lark(grammar.into()));
        }
        if let Prompt::Chat(chat) = &mut request.prompt {
            chat.tools = Some(Value::Array(tools.definitions));
        }
    }
    // An answer of a form that the client chose is no tool call, whatever it looks like.
    let format = format.filter(|_| tools.mode != ToolMode::Auto || request.structured.is_none());
    request.thinking = card.reasoning.as_ref().map(|marks| Thinking {
        start: marks.start.to_owned(),
        end: marks.end.to_owned(),
        budget,
    });
    if budget.is_some() && request.thinking.is_none() {
        return Err(ApiError::invalid(
            "thinking",
            "this model does not mark its thoughts, so they can have no budget; start the server with --reasoning-parser if it does",
        ));
    }
    let parser = (format.is_some() || card.reasoning.is_some()).then(|| {
        let marks = format.iter().flat_map(|format| format.marks());
        let marks = marks.chain(card.reasoning.iter().flat_map(|marks| [&marks.start, &marks.end]));
        // Marks that are special tokens must come as text to be seen; the others are taken out again.
        let asked = request.include_special_tokens;
        request.include_special_tokens |= marks.into_iter().any(|mark| card.special_token(mark).is_some());
        let hidden = if asked { Vec::new() } else { card.special_texts() };
        ParserConfig {
            reasoning: card.reasoning,
            starts_in_reasoning: false,
            tools: format,
            tool_names: names.into(),
            special_tokens: hidden.into(),
        }
    });
    Ok(Ask { request, parser, single_tool_call: !tools.parallel })
}

/// The names of the tools.
fn check(tools: &Tools) -> Result<Vec<String>, ApiError> {
    if tools.definitions.len() > MAX_TOOLS {
        let count = tools.definitions.len();
        return Err(ApiError::invalid(
            "tools",
            format!("has {count} tools; at most {MAX_TOOLS} are accepted"),
        ));
    }
    let mut names = Vec::with_capacity(tools.definitions.len());
    for (at, tool) in tools.definitions.iter().enumerate() {
        let name = tool["function"]["name"].as_str().unwrap_or_default();
        let fits = (1..=MAX_NAME).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
        if !fits {
            let message = format!("must be 1 to {MAX_NAME} letters, digits, `_`, `-` or `.`");
            return Err(ApiError::invalid(format!("tools[{at}].function.name"), message));
        }
        let parameters = &tool["function"]["parameters"];
        if !parameters.is_null() && !parameters.is_object() {
            let message = "must be a JSON Schema object";
            return Err(ApiError::invalid(format!("tools[{at}].function.parameters"), message));
        }
        names.push(name.to_owned());
    }
    match &tools.mode {
        ToolMode::Named(name) if !names.contains(name) => {
            Err(ApiError::invalid("tool_choice", format!("names {name:?}, which is not among the tools")))
        }
        ToolMode::Required if names.is_empty() => {
            Err(ApiError::invalid("tool_choice", "\"required\" needs tools; give some in `tools`"))
        }
        _ => Ok(names),
    }
}

/// The grammar of an answer that must be a tool call.
fn grammar(card: &ModelCard, format: ToolFormat, tools: &Tools) -> Result<Option<String>, ApiError> {
    let choice = match &tools.mode {
        ToolMode::Off | ToolMode::Auto => return Ok(None),
        ToolMode::Required => ToolChoice::Required,
        ToolMode::Named(name) => ToolChoice::Named(name),
    };
    let definition = |tool: &Value| ToolDef {
        name: tool["function"]["name"].as_str().unwrap_or_default().to_owned(),
        parameters: tool["function"]["parameters"].clone(),
    };
    let definitions: Vec<ToolDef> = tools.definitions.iter().map(definition).collect();
    let grammar = ToolGrammar {
        format,
        tools: &definitions,
        choice,
        parallel: tools.parallel,
        special_token: &|mark| card.special_token(mark),
    };
    tool_grammar(&grammar).map(Some).map_err(|message| ApiError::invalid("tools", message))
}
