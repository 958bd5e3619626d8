//! `tools` and `tool_choice` as OpenAI's chat has them.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use crate::http::{
    ApiError,
    answer::asking::{ToolMode, Tools},
};

/// `tool_choice`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ToolChoiceField {
    /// none, auto or required.
    Mode(String),
    /// `{"type": "function", "function": {"name": …}}`.
    Named {
        /// The function.
        function: FunctionName,
    },
}

/// A function's name.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct FunctionName {
    /// Among `tools`.
    pub name: String,
}

/// The tools of a chat.
///
/// # Errors
/// 400 for tools of another kind than functions and for an unknown choice.
pub fn tools(
    definitions: Option<Vec<Value>>,
    choice: Option<ToolChoiceField>,
    parallel: Option<bool>,
) -> Result<Tools, ApiError> {
    let definitions = definitions.unwrap_or_default();
    if let Some(at) = definitions.iter().position(|tool| tool["type"] != "function") {
        let message = format!("is {}; only functions can be called here", definitions[at]["type"]);
        return Err(ApiError::invalid(format!("tools[{at}].type"), message));
    }
    let mode = match choice {
        None if definitions.is_empty() => ToolMode::Off,
        None => ToolMode::Auto,
        Some(ToolChoiceField::Named { function }) => ToolMode::Named(function.name),
        Some(ToolChoiceField::Mode(mode)) => match mode.as_str() {
            "none" => ToolMode::Off,
            "auto" if definitions.is_empty() => ToolMode::Off,
            "auto" => ToolMode::Auto,
            "required" => ToolMode::Required,
            other => {
                let message =
                    format!("is {other:?}; use none, auto, required or {{\"type\": \"function\", …}}");
                return Err(ApiError::invalid("tool_choice", message));
            }
        },
    };
    Ok(Tools { definitions, mode, parallel: parallel.unwrap_or(true) })
}
