//! What requests for messages carry, and what of it cannot be done here.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::http::{
    ApiError,
    answer::asking::{ToolMode, Tools},
};

/// What makes the prompt.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct PromptFields {
    /// The model's name; absent for whatever is served.
    pub model: Option<String>,
    /// The conversation, oldest first. An answer goes on from a last message of the assistant.
    pub messages: Vec<MessageParam>,
    /// What stands before the conversation.
    pub system: Option<Content>,
    /// Tools that the model may call.
    pub tools: Option<Vec<ToolParam>>,
    /// Whether it does.
    pub tool_choice: Option<ToolChoice>,
    /// Whether the model thinks first, where it can.
    pub thinking: Option<ThinkingField>,
    /// The answer's form, and how much effort it is worth.
    pub output_config: Option<OutputConfig>,
    /// An older name of `output_config.format`.
    pub output_format: Option<OutputFormat>,
    /// Not supported.
    pub container: Option<Value>,
    /// Not supported.
    pub mcp_servers: Option<Vec<Value>>,
    /// Not supported.
    pub context_management: Option<Value>,
}

/// What is of answers alone.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct MessageFields {
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// Server-sent events instead of one answer.
    pub stream: Option<bool>,
    /// Strings that end the answer.
    pub stop_sequences: Option<Vec<String>>,
    /// Who asks.
    pub metadata: Option<Metadata>,
    /// Only `standard`.
    pub speed: Option<String>,
}

/// One turn.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct MessageParam {
    /// user, assistant or system.
    pub role: String,
    /// What was said.
    pub content: Content,
}

/// Text, or blocks.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Content {
    /// The same as one block of text.
    Text(String),
    /// Several things.
    Blocks(Vec<Block>),
}

/// A part of a turn; which fields count depends on its type.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Block {
    /// text, thinking, tool_use or tool_result.
    #[serde(rename = "type")]
    pub kind: String,
    /// Of text.
    pub text: Option<String>,
    /// Of thinking.
    pub thinking: Option<String>,
    /// Of tool_use.
    pub id: Option<String>,
    /// Of tool_use.
    pub name: Option<String>,
    /// Of tool_use.
    pub input: Option<Map<String, Value>>,
    /// Of tool_result: the call that it answers.
    pub tool_use_id: Option<String>,
    /// Of tool_result.
    pub content: Option<ResultContent>,
    /// Of tool_result.
    pub is_error: Option<bool>,
}

/// What a tool said.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ResultContent {
    /// Text.
    Text(String),
    /// Blocks of text.
    Blocks(Vec<ResultBlock>),
}

/// A part of what a tool said.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ResultBlock {
    /// text.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text.
    pub text: Option<String>,
}

/// A tool of the client's.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ToolParam {
    /// Absent or `custom`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// What it does.
    pub description: Option<String>,
    /// The JSON Schema of its input.
    pub input_schema: Option<Value>,
}

/// Whether the model calls tools.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToolChoice {
    /// As it sees fit.
    Auto {
        /// At most one call.
        #[serde(default)]
        disable_parallel_tool_use: bool,
    },
    /// It must.
    Any {
        /// Exactly one call.
        #[serde(default)]
        disable_parallel_tool_use: bool,
    },
    /// It must call this one.
    Tool {
        /// Among `tools`.
        name: String,
        /// Exactly one call.
        #[serde(default)]
        disable_parallel_tool_use: bool,
    },
    /// It does not.
    None,
}

/// Whether the model thinks first.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ThinkingField {
    /// For so many tokens at most.
    Enabled {
        /// Less than `max_tokens`.
        budget_tokens: u32,
        /// Whether thoughts stand in the answer.
        #[serde(default)]
        display: Option<Display>,
    },
    /// As it sees fit.
    Adaptive {
        /// Whether thoughts stand in the answer.
        #[serde(default)]
        display: Option<Display>,
    },
    /// It does not.
    Disabled,
}

impl ThinkingField {
    /// Whether thoughts stand in the answer.
    pub fn display(self) -> Display {
        match self {
            Self::Enabled { display, .. } | Self::Adaptive { display } => {
                display.unwrap_or(Display::Summarized)
            }
            Self::Disabled => Display::Omitted,
        }
    }
}

/// How thoughts are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Display {
    /// In full: nothing is summarised here.
    Summarized,
    /// As blocks without text.
    Omitted,
}

/// The answer's form, and how much effort it is worth.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct OutputConfig {
    /// For the chat template, as `reasoning_effort`.
    pub effort: Option<String>,
    /// JSON of a schema.
    pub format: Option<OutputFormat>,
}

/// JSON of a schema.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct OutputFormat {
    /// json_schema.
    #[serde(rename = "type")]
    pub kind: String,
    /// The schema.
    pub schema: Option<Value>,
}

/// Who asks.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Metadata {
    /// The tenant of fair scheduling.
    pub user_id: Option<String>,
}

impl PromptFields {
    /// What cannot be done, with what to do instead.
    ///
    /// # Errors
    /// 400 for it.
    pub fn refuse_unsupported(&self) -> Result<(), ApiError> {
        let unsupported = [
            (self.container.is_some(), "container", "no code is executed here; leave it out"),
            (
                self.mcp_servers.as_ref().is_some_and(|servers| !servers.is_empty()),
                "mcp_servers",
                "no MCP server is called from here; call it yourself and give its tools in `tools`",
            ),
            (
                self.context_management.is_some(),
                "context_management",
                "conversations are not edited here; send the messages that the model shall see",
            ),
        ];
        match unsupported.into_iter().find(|(asked, ..)| *asked) {
            Some((_, field, message)) => Err(ApiError::invalid(field, message)),
            None => Ok(()),
        }
    }

    /// The schema that the answer must satisfy, if any.
    ///
    /// # Errors
    /// 400 for another form, and for two.
    pub fn format(&self) -> Result<Option<&Value>, ApiError> {
        let new = self.output_config.as_ref().and_then(|config| config.format.as_ref());
        let (field, format) = match (new, self.output_format.as_ref()) {
            (None, None) => return Ok(None),
            (Some(format), None) => ("output_config.format", format),
            (None, Some(format)) => ("output_format", format),
            (Some(_), Some(_)) => {
                let message = "is the older name of output_config.format; give one of them";
                return Err(ApiError::invalid("output_format", message));
            }
        };
        if format.kind != "json_schema" {
            let message = format!("is {:?}; only json_schema is known", format.kind);
            return Err(ApiError::invalid(format!("{field}.type"), message));
        }
        let missing = || ApiError::invalid(format!("{field}.schema"), "is missing; give a JSON Schema");
        format.schema.as_ref().map(Some).ok_or_else(missing)
    }
}

impl MessageFields {
    /// What cannot be done, with what to do instead.
    ///
    /// # Errors
    /// 400 for it.
    pub fn refuse_unsupported(&self) -> Result<(), ApiError> {
        match self.speed.as_deref() {
            None | Some("standard") => Ok(()),
            Some(other) => {
                let message = format!("is {other:?}; there is one speed here, \"standard\"");
                Err(ApiError::invalid("speed", message))
            }
        }
    }
}

/// The tools of a request.
///
/// # Errors
/// 400 for tools that only Anthropic's servers have.
pub fn tools(tools: Option<Vec<ToolParam>>, choice: Option<ToolChoice>) -> Result<Tools, ApiError> {
    let mut definitions = Vec::new();
    for (at, tool) in tools.unwrap_or_default().into_iter().enumerate() {
        if let Some(kind) = tool.kind.filter(|kind| kind != "custom") {
            let message = format!("is {kind:?}; only tools of the client's own can be called here");
            return Err(ApiError::invalid(format!("tools[{at}].type"), message));
        }
        let missing = |field: &str| ApiError::invalid(format!("tools[{at}].{field}"), "is missing");
        let name = tool.name.ok_or_else(|| missing("name"))?;
        let schema = tool.input_schema.ok_or_else(|| missing("input_schema"))?;
        let mut function = json!({ "name": name, "parameters": schema });
        if let Some(description) = tool.description {
            function["description"] = description.into();
        }
        definitions.push(json!({ "type": "function", "function": function }));
    }
    let (mode, single) = match choice {
        None if definitions.is_empty() => (ToolMode::Off, false),
        None => (ToolMode::Auto, false),
        Some(ToolChoice::None) => (ToolMode::Off, false),
        Some(ToolChoice::Auto { .. }) if definitions.is_empty() => (ToolMode::Off, false),
        Some(ToolChoice::Auto { disable_parallel_tool_use }) => (ToolMode::Auto, disable_parallel_tool_use),
        Some(ToolChoice::Any { .. }) if definitions.is_empty() => {
            return Err(ApiError::invalid("tool_choice", "\"any\" needs tools; give some in `tools`"));
        }
        Some(ToolChoice::Any { disable_parallel_tool_use }) => {
            (ToolMode::Required, disable_parallel_tool_use)
        }
        Some(ToolChoice::Tool { name, disable_parallel_tool_use }) => {
            (ToolMode::Named(name), disable_parallel_tool_use)
        }
    };
    Ok(Tools { definitions, mode, parallel: !single })
}
