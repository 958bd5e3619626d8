//! What requests for responses carry, and what of it cannot be done here.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tidemill_engine::structured::Structured;

use crate::http::{
    ApiError,
    answer::asking::{ToolMode, Tools},
};

/// The one thing that can be included beside log-probabilities.
const ENCRYPTED_REASONING: &str = "reasoning.encrypted_content";
const LOGPROBS: &str = "message.output_text.logprobs";
/// Bounds of OpenAI's `metadata`: pairs, and characters of keys and values.
const METADATA: (usize, usize, usize) = (16, 64, 512);

/// What is of responses alone.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ResponseFields {
    /// The model's name; absent for whatever is served.
    pub model: Option<String>,
    /// A text, or items: messages, function calls, their outputs, thoughts.
    pub input: InputField,
    /// Stands before the conversation, and does not become a part of it.
    pub instructions: Option<String>,
    /// A stored response that this one goes on from.
    pub previous_response_id: Option<String>,
    /// False forgets the response when it has been sent.
    pub store: Option<bool>,
    /// Server-sent events instead of one answer.
    pub stream: Option<bool>,
    /// More about the stream.
    pub stream_options: Option<ResponseStreamOptions>,
    /// Answers at once and goes on; GET shows what became of it.
    pub background: Option<bool>,
    /// Tokens to generate at most.
    pub max_output_tokens: Option<u32>,
    /// The answer's form.
    pub text: Option<TextField>,
    /// Functions that the model may call.
    pub tools: Option<Vec<Value>>,
    /// Whether it does.
    pub tool_choice: Option<ToolChoiceField>,
    /// Whether it may call several.
    pub parallel_tool_calls: Option<bool>,
    /// Whether and how the model thinks first, where it can.
    pub reasoning: Option<ReasoningField>,
    /// Tokens that the model may think.
    pub thinking_token_budget: Option<u32>,
    /// Kept with the response.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Alternatives of each token, up to 20.
    pub top_logprobs: Option<u32>,
    /// `message.output_text.logprobs` and `reasoning.encrypted_content`.
    pub include: Option<Vec<String>>,
    /// Only `disabled`.
    pub truncation: Option<String>,
    /// Not supported.
    pub conversation: Option<Value>,
    /// Not supported.
    pub prompt: Option<Value>,
    /// Not supported.
    pub context_management: Option<Value>,
}

/// A text, or items.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum InputField {
    /// The same as one message of the user.
    Text(String),
    /// Items, oldest first.
    Items(Vec<Value>),
}

/// More about a stream.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ResponseStreamOptions {
    /// Only false.
    pub include_obfuscation: Option<bool>,
}

/// The answer's text.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct TextField {
    /// Its form.
    pub format: Option<TextFormat>,
    /// Only `medium`.
    pub verbosity: Option<String>,
}

/// The form of a text.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TextFormat {
    /// Any text.
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON of a schema, which the answer satisfies whether `strict` is set or not.
    JsonSchema {
        /// The schema.
        schema: Value,
    },
}

/// `tool_choice`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ToolChoiceField {
    /// none, auto or required.
    Mode(String),
    /// `{"type": "function", "name": …}`.
    Named {
        /// function.
        #[serde(rename = "type")]
        kind: String,
        /// Among `tools`.
        name: Option<String>,
    },
}

/// Whether and how the model thinks.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ReasoningField {
    /// none lets models that can do without thoughts do without; other words are for the chat template.
    pub effort: Option<String>,
    /// auto, concise or detailed put the thoughts into the item's summary; nothing is summarised here.
    pub summary: Option<String>,
    /// An older name of `summary`.
    pub generate_summary: Option<String>,
}

impl ResponseFields {
    /// What cannot be done, with what to do instead.
    ///
    /// # Errors
    /// 400 for it.
    pub fn refuse_unsupported(&self) -> Result<(), ApiError> {
        let background = self.background == Some(true);
        let is_other = |value: &Option<String>, only: &str| value.as_ref().is_some_and(|value| value != only);
        let obfuscated =
            self.stream_options.as_ref().is_some_and(|options| options.include_obfuscation == Some(true));
        let verbosity = self.text.as_ref().is_some_and(|text| is_other(&text.verbosity, "medium"));
        let unsupported = [
            (
                background && self.store == Some(false),
                "background",
                "needs `store: true`: the response is fetched later",
            ),
            (
                background && self.stream == Some(true),
                "background",
                "cannot be streamed; leave `stream` out and ask GET /v1/responses/{id} how it goes",
            ),
            (
                is_other(&self.truncation, "disabled"),
                "truncation",
                "only \"disabled\" is supported: send what fits the context",
            ),
            (
                self.conversation.is_some(),
                "conversation",
                "conversations are not kept; use `previous_response_id`",
            ),
            (self.prompt.is_some(), "prompt", "prompts are not kept; use `instructions` and `input`"),
            (
                self.context_management.is_some(),
                "context_management",
                "contexts are not compacted; send the items that the model shall see",
            ),
            (obfuscated, "stream_options.include_obfuscation", "is not supported; leave it out"),
            (verbosity, "text.verbosity", "only \"medium\" is supported; say it in `instructions`"),
            (
                self.top_logprobs.is_some_and(|top| top > 0) && !self.includes(LOGPROBS),
                "top_logprobs",
                "needs `include: [\"message.output_text.logprobs\"]`",
            ),
        ];
        if let Some((_, field, message)) = unsupported.into_iter().find(|(asked, ..)| *asked) {
            return Err(ApiError::invalid(field, message));
        }
        let known = |name: &&String| ![LOGPROBS, ENCRYPTED_REASONING].contains(&name.as_str());
        if let Some(name) = self.include.iter().flatten().find(known) {
            let message =
                format!("has {name:?}; what can be included is {LOGPROBS} and {ENCRYPTED_REASONING}");
            return Err(ApiError::invalid("include", message));
        }
        self.check_metadata()
    }

    fn check_metadata(&self) -> Result<(), ApiError> {
        let (pairs, key, value) = METADATA;
        let metadata = self.metadata.iter().flatten();
        let fits = |(k, v): (&String, &String)| k.chars().count() <= key && v.chars().count() <= value;
        if metadata.clone().count() > pairs || !metadata.clone().all(fits) {
            let message =
                format!("takes {pairs} pairs; keys have up to {key} characters, values up to {value}");
            return Err(ApiError::invalid("metadata", message));
        }
        Ok(())
    }

    fn includes(&self, name: &str) -> bool {
        self.include.iter().flatten().any(|included| included == name)
    }

    /// How many alternatives of each token the answer shows; `None` without log-probabilities.
    pub fn logprobs(&self) -> Option<u32> {
        self.includes(LOGPROBS).then(|| self.top_logprobs.unwrap_or(0))
    }

    /// How thoughts are shown.
    pub fn thoughts(&self) -> ThoughtStyle {
        let reasoning = self.reasoning.as_ref();
        let summary = reasoning.and_then(|field| field.summary.as_ref().or(field.generate_summary.as_ref()));
        ThoughtStyle { as_summary: summary.is_some(), encrypted: self.includes(ENCRYPTED_REASONING) }
    }

    /// The form that the answer must have, if any.
    pub fn form(&self) -> Option<Structured> {
        match self.text.as_ref()?.format.as_ref()? {
            TextFormat::Text => None,
            TextFormat::JsonObject => Some(Structured::JsonObject),
            TextFormat::JsonSchema { schema } => Some(Structured::JsonSchema(schema.to_string().into())),
        }
    }
}

/// How thoughts are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ThoughtStyle {
    /// In the summary instead of the content.
    pub as_summary: bool,
    /// Also in a form that clients hand back unread.
    pub encrypted: bool,
}

/// The tools of a response, which are flatter than a chat's.
///
/// # Errors
/// 400 for tools that only OpenAI's servers have, and for an unknown choice.
pub fn tools(
    given: &[Value],
    choice: Option<&ToolChoiceField>,
    parallel: Option<bool>,
) -> Result<Tools, ApiError> {
    let mut definitions = Vec::with_capacity(given.len());
    for (at, tool) in given.iter().enumerate() {
        if tool["type"] != "function" {
            let message =
                format!("is {}; only functions of the client's own can be called here", tool["type"]);
            return Err(ApiError::invalid(format!("tools[{at}].type"), message));
        }
        let mut function = json!({});
        for field in ["name", "description", "parameters"] {
            if !tool[field].is_null() {
                function[field] = tool[field].clone();
            }
        }
        definitions.push(json!({ "type": "function", "function": function }));
    }
    let wrong = |message: String| Err(ApiError::invalid("tool_choice", message));
    let mode = match choice {
        None if definitions.is_empty() => ToolMode::Off,
        None => ToolMode::Auto,
        Some(ToolChoiceField::Named { kind, name: Some(name) }) if kind == "function" => {
            ToolMode::Named(name.clone())
        }
        Some(ToolChoiceField::Named { kind, .. }) => {
            return wrong(format!("is of type {kind:?}; use {{\"type\": \"function\", \"name\": …}}"));
        }
        Some(ToolChoiceField::Mode(mode)) => match mode.as_str() {
            "none" => ToolMode::Off,
            "auto" if definitions.is_empty() => ToolMode::Off,
            "auto" => ToolMode::Auto,
            "required" => ToolMode::Required,
            other => return wrong(format!("is {other:?}; use none, auto, required or a function")),
        },
    };
    Ok(Tools { definitions, mode, parallel: parallel.unwrap_or(true) })
}
