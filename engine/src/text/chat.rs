//! Chat templates: Jinja as Hugging Face transformers runs it (`utils/chat_template_utils.py` of 5.23), fenced.
//!
//! The template comes with the model, the conversation from a client. Both are bounded: fuel for instructions, depth of
//! recursion, number of messages, size of the output.

use std::{io, path::PathBuf};

use minijinja::{
    Environment, Error, ErrorKind, Output, State, UndefinedBehavior, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde, Value},
};
use serde::Serialize;
use serde_json::Map;

use crate::{
    error::{LoadError, RequestError},
    model::files::{self, MAX_TEMPLATE_BYTES, ModelFiles, TOKENIZER_CONFIG},
    text::{
        guard::on_large_stack,
        pyjson::{Style, dumps},
    },
};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChatMessage {
    /// "system", "user", "assistant", "tool", or what the template knows.
    pub role: String,
    /// The text.
    pub content: String,
    /// Tool calls of an assistant's turn in the OpenAI form: a JSON array.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<serde_json::Value>,
    /// In a tool's turn: the call that it answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// Who speaks, where roles are not enough; in a tool's turn the function.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What a reasoning model thought before an assistant's turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

impl ChatMessage {
    /// A turn that is nothing but text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            tool_calls: None,
            tool_call_id: None,
            name: None,
            reasoning_content: None,
        }
    }
}

/// A conversation to render.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatPrompt {
    /// The turns, oldest first.
    pub messages: Vec<ChatMessage>,
    /// Tool definitions in the OpenAI form: a JSON array.
    pub tools: Option<serde_json::Value>,
    /// Ends the text with the start of an assistant's turn.
    pub add_generation_prompt: bool,
    /// Ends the text within the last turn, right after its content, so that the completion goes on from there. Wins over
    /// `add_generation_prompt`.
    pub continue_final_message: bool,
    /// More variables for the template, such as `enable_thinking`. They cannot replace those above.
    pub template_kwargs: Map<String, serde_json::Value>,
}

impl ChatPrompt {
    /// A conversation that the assistant is to go on with.
    pub fn new(messages: Vec<ChatMessage>) -> Self {
        Self {
            messages,
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            template_kwargs: Map::new(),
        }
    }
}

/// Most messages of a conversation. Some templates look through all of them for each.
pub const MAX_MESSAGES: usize = 4096;
/// Largest rendered conversation in bytes.
pub const MAX_RENDERED_BYTES: usize = 16 << 20;
/// Instructions of one rendering: well under a second. A turn of a conversation needs 20 to 200.
const FUEL: u64 = 4_000_000;
/// Nested macro calls. Known templates need under ten.
const MAX_RECURSION: usize = 100;

/// A model's compiled templates.
#[derive(Debug)]
pub(super) struct ChatTemplates {
    environment: Environment<'static>,
    /// `bos_token` and the like.
    special_tokens: Value,
    has_tool_template: bool,
    /// The template for conversations with tools where there are two.
    source: String,
}

/// Stands behind the content of a turn that is to be gone on from. The space at its end is part of it.
const END_OF_CONTENT: &str = "END_OF_FINAL_MESSAGE_TO_GO_ON_FROM ";

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplates {
    /// Finds and compiles the model's templates: the override, `chat_template.jinja`, or `tokenizer_config.json`'s.
    pub(super) fn load(model: &ModelFiles) -> Result<Option<Self>, LoadError> {
        let config = tokenizer_config(model)?;
        let (path, sources) = sources(model, &config)?;
        if sources.is_empty() {
            return Ok(None);
        }
        let mut environment = environment();
        for (name, source) in &sources {
            let source = neutral_generation_tags(source);
            on_large_stack(|| environment.add_template_owned(name.clone(), source))
                .unwrap_or_else(|panic| Err(Error::new(ErrorKind::SyntaxError, panic)))
                .map_err(|error| LoadError::Format {
                    path: path.clone(),
                    detail: format!("the chat template does not compile: {error}"),
                })?;
        }
        let has_tool_template = sources.iter().any(|(name, _)| name == TOOL_USE);
        let name = if has_tool_template { TOOL_USE } else { DEFAULT };
        let source = sources.into_iter().find(|source| source.0 == name).map(|source| source.1);
        Ok(Some(Self {
            environment,
            special_tokens: special_tokens(&config),
            has_tool_template,
            source: source.unwrap_or_default(),
        }))
    }

    /// As it was written.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as text.
    pub(super) fn render(&self, prompt: &ChatPrompt) -> Result<String, RequestError> {
        if prompt.continue_final_message { self.render_open(prompt) } else { self.render_whole(prompt) }
    }

    /// The conversation without what the template puts after the last turn's content. As in transformers, a mark behind that content
    /// says where it ends; the mark's own space says whether the template trims it.
    fn render_open(&self, prompt: &ChatPrompt) -> Result<String, RequestError> {
        let invalid = |message: &str| RequestError::invalid("prompt.chat", message);
        let mut marked =
            ChatPrompt { continue_final_message: false, add_generation_prompt: false, ..prompt.clone() };
        let Some(last) = marked.messages.last_mut() else {
            return Err(invalid("is empty, so there is no last message to go on from"));
        };
        last.content.push_str(END_OF_CONTENT);
        let mut text = self.render_whole(&marked)?;
        let Some(end) = text.rfind(END_OF_CONTENT.trim_end()) else {
            return Err(invalid(
                "the chat template leaves the last message out, so it cannot be gone on from",
            ));
        };
        let is_trimmed = !text[end..].starts_with(END_OF_CONTENT);
        text.truncate(end);
        if is_trimmed {
            text.truncate(text.trim_end().len());
        }
        Ok(text)
    }

    fn render_whole(&self, prompt: &ChatPrompt) -> Result<String, RequestError> {
        let invalid = |message: String| RequestError::invalid("prompt.chat", message);
        if prompt.messages.len() > MAX_MESSAGES {
            let count = prompt.messages.len();
            return Err(invalid(format!("has {count} messages; at most {MAX_MESSAGES} are accepted")));
        }
        let name = if prompt.tools.is_some() && self.has_tool_template { TOOL_USE } else { DEFAULT };
        let mut output = Bounded(Vec::new());
        let rendered = on_large_stack(|| {
            let context = context! {
                messages => Value::from(Serde(&prompt.messages)),
                tools => Value::from(Serde(&prompt.tools)),
                documents => (),
                add_generation_prompt => prompt.add_generation_prompt,
                ..minijinja::value::merge_maps([
                    Value::from(Serde(&prompt.template_kwargs)),
                    self.special_tokens.clone(),
                ])
            };
            self.environment.get_template(name)?.render_captured_to(context, &mut output).map(|_| ())
        });
        match rendered {
            Err(panic) => Err(RequestError::Internal(format!("the chat template failed: {panic}"))),
            Ok(Err(error)) => Err(invalid(explain(&error))),
            Ok(Ok(())) => {
                String::from_utf8(output.0).map_err(|error| RequestError::Internal(error.to_string()))
            }
        }
    }
}

/// The message of `raise_exception`, or what went wrong in the template.
fn explain(error: &Error) -> String {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return message.clone();
        }
        if current.downcast_ref::<io::Error>().is_some() {
            return format!("renders to more than {MAX_RENDERED_BYTES} bytes");
        }
        cause = current.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => "takes the chat template too long to render".to_owned(),
        _ => format!("the chat template cannot render it: {error}"),
    }
}

/// The message of a template's `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// Output that refuses to grow past [`MAX_RENDERED_BYTES`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the default delimiters do not clash"));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_fuel(Some(FUEL));
    environment.set_debug(false);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(format_like_python);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// Jinja prints Python's words for the three constants.
fn format_like_python(
    output: &mut Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    let word = match value.kind() {
        minijinja::value::ValueKind::None => "None",
        minijinja::value::ValueKind::Bool if value.is_true() => "True",
        minijinja::value::ValueKind::Bool => "False",
        _ => return minijinja::escape_formatter(output, state, value),
    };
    output.write_str(word).map_err(Error::from)
}

/// `markupsafe.escape`, which writes quotes as numbers.
fn escape(value: &Value) -> String {
    let text = value.to_string().replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('\'', "&#39;").replace('"', "&#34;")
}

/// The filter of transformers: `json.dumps` without HTML escapes.
fn tojson(value: &Value, arguments: Kwargs) -> Result<Value, Error> {
    let indent = match arguments.get::<Option<Value>>("indent")? {
        None => None,
        Some(value) if value.is_none() => None,
        Some(value) => match value.as_str() {
            Some(text) => Some(text.to_owned()),
            None => Some(" ".repeat(usize::try_from(value)?.min(32))),
        },
    };
    let (item, key) = match arguments.get::<Option<Value>>("separators")? {
        Some(pair) if !pair.is_none() => {
            (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string())
        }
        _ => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = Style {
        ensure_ascii: arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item_separator: item,
        key_separator: key,
    };
    arguments.assert_all_used()?;
    dumps(value, &style).map(Value::from)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// `datetime.now().strftime(format)`: the wall clock in the local time zone.
fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

fn tokenizer_config(model: &ModelFiles) -> Result<Map<String, serde_json::Value>, LoadError> {
    let Some(bytes) = model.read(TOKENIZER_CONFIG)? else { return Ok(Map::new()) };
    serde_json::from_slice(&bytes).map_err(|error| LoadError::Format {
        path: model.path(TOKENIZER_CONFIG),
        detail: format!("not a JSON object: {error}"),
    })
}

type Sources = Vec<(String, String)>;

/// The templates by name and the file they are in. Empty where the model has none.
fn sources(
    model: &ModelFiles,
    config: &Map<String, serde_json::Value>,
) -> Result<(PathBuf, Sources), LoadError> {
    let one = |source: String| vec![(DEFAULT.to_owned(), source)];
    if let Some((path, bytes)) = model.chat_template()? {
        let source = files::utf8(&path, &bytes)?.to_owned();
        return Ok((path, one(source)));
    }
    let path = model.path(TOKENIZER_CONFIG);
    let bad = || LoadError::Format {
        path: path.clone(),
        detail:
            "field `chat_template` must be a string or a list of {name, template} with one named \"default\""
                .to_owned(),
    };
    let sources = match config.get("chat_template") {
        None | Some(serde_json::Value::Null) => Vec::new(),
        Some(serde_json::Value::String(source)) => one(source.clone()),
        Some(serde_json::Value::Array(list)) => {
            let text = |entry: &serde_json::Value, field: &str| Some(entry.get(field)?.as_str()?.to_owned());
            let entry = |entry| Some((text(entry, "name")?, text(entry, "template")?));
            let mut all: Sources = list.iter().map(entry).collect::<Option<_>>().ok_or_else(bad)?;
            all.retain(|(name, _)| name == DEFAULT || name == TOOL_USE);
            if !all.iter().any(|(name, _)| name == DEFAULT) {
                return Err(bad());
            }
            all
        }
        Some(_) => return Err(bad()),
    };
    if let Some((name, _)) = sources.iter().find(|(_, source)| source.len() as u64 > MAX_TEMPLATE_BYTES) {
        let detail = format!("chat template {name:?} is larger than {MAX_TEMPLATE_BYTES} bytes");
        return Err(LoadError::Format { path, detail });
    }
    Ok((path, sources))
}

/// The special tokens that templates may name: a string, or an object with its `content`.
fn special_tokens(config: &Map<String, serde_json::Value>) -> Value {
    let names = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"].map(|name| format!("{name}_token"));
    let text = |name: &String| {
        let token = config.get(name)?;
        token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
    };
    Value::from_pairs(names.into_iter().filter_map(|name| text(&name).map(|token| (name, token))))
}

/// `{% generation %}` marks what an assistant wrote, for training. In a prompt it means nothing: it becomes an `if true`.
fn neutral_generation_tags(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        output.push_str(before);
        output.push_str("{%");
        rest = tag;
        let Some((inner, after)) = tag.split_once("%}") else { break };
        let (word, neutral) = match inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => ("generation", "if true"),
            "endgeneration" => ("endgeneration", "endif"),
            _ => continue,
        };
        output.push_str(&inner.replacen(word, neutral, 1));
        output.push_str("%}");
        rest = after;
    }
    output.push_str(rest);
    output
}
