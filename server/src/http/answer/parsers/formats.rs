//! The formats by name, and which of them a chat template shows.

use std::{fmt, str::FromStr};

/// How a model writes tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Hermes, Qwen 2.5 and Qwen 3 do.
    Hermes,
    /// `{"name": …, "parameters": {…}}` alone or after `<|python_tag|>`, as Llama 3.1 and 3.2 do.
    Llama3Json,
    /// `[f(a=1, b="x"), g()]`, as Llama 3.2 and 4 do when their template asks for it.
    Pythonic,
    /// `[TOOL_CALLS] [{"name": …, "arguments": {…}}]`, and the later `[TOOL_CALLS]name[ARGS]{…}`.
    Mistral,
    /// An object with a name and arguments (or parameters), or an array of such.
    Json,
}

/// The marks around a model's thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReasoningFormat {
    /// The style's name in flags.
    pub name: &'static str,
    /// Begins the thoughts.
    pub start: &'static str,
    /// Ends them.
    pub end: &'static str,
}

impl ToolFormat {
    /// What marks a call, where that may be special tokens of the tokenizer.
    pub fn marks(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["<tool_call>", "</tool_call>"],
            Self::Llama3Json => &["<|python_tag|>"],
            Self::Pythonic => &["<|python_start|>", "<|python_end|>"],
            Self::Mistral => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
            Self::Json => &[],
        }
    }
}

impl ReasoningFormat {
    /// `<think>…</think>`: DeepSeek-R1 and its distillations, Qwen 3, QwQ and most others.
    pub const THINK: Self = Self { name: "think", start: "<think>", end: "</think>" };
    /// `[THINK]…[/THINK]`: Magistral.
    pub const MISTRAL: Self = Self { name: "mistral", start: "[THINK]", end: "[/THINK]" };
    /// `<seed:think>…</seed:think>`: Seed-OSS.
    pub const SEED_OSS: Self = Self { name: "seed_oss", start: "<seed:think>", end: "</seed:think>" };
}

/// What a flag such as `--tool-call-parser` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ParserChoice<F> {
    /// Whatever [`detect`] finds in the model's chat template.
    #[default]
    Auto,
    /// Leave everything in the text.
    Off,
    /// This format.
    Fixed(F),
}

impl<F: Copy> ParserChoice<F> {
    /// The format to use, given what the chat template shows.
    pub fn resolve(&self, detected: Option<F>) -> Option<F> {
        match self {
            Self::Auto => detected,
            Self::Off => None,
            Self::Fixed(format) => Some(*format),
        }
    }
}

/// A format's name that is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownParser {
    given: String,
    known: String,
}

impl fmt::Display for UnknownParser {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "there is no parser named {:?}; use one of {}", self.given, self.known)
    }
}

impl std::error::Error for UnknownParser {}

/// A format with its name and the other names it goes by (those of vLLM and SGLang).
type Named<F> = (F, &'static [&'static str]);

const TOOLS: [Named<ToolFormat>; 5] = [
    (ToolFormat::Hermes, &["hermes", "qwen25"]),
    (ToolFormat::Llama3Json, &["llama3_json", "llama4_json", "llama3"]),
    (ToolFormat::Pythonic, &["pythonic", "llama4_pythonic"]),
    (ToolFormat::Mistral, &["mistral"]),
    (ToolFormat::Json, &["json"]),
];

const REASONING: [Named<ReasoningFormat>; 3] = [
    (ReasoningFormat::THINK, &["think", "deepseek_r1", "deepseek-r1", "qwen3"]),
    (ReasoningFormat::MISTRAL, &["mistral"]),
    (ReasoningFormat::SEED_OSS, &["seed_oss"]),
];

fn choose<F: Copy>(table: &[Named<F>], given: &str) -> Result<ParserChoice<F>, UnknownParser> {
    match given {
        "auto" => return Ok(ParserChoice::Auto),
        "none" => return Ok(ParserChoice::Off),
        _ => {}
    }
    let found = table.iter().find(|(_, names)| names.contains(&given));
    found.map(|(format, _)| ParserChoice::Fixed(*format)).ok_or_else(|| {
        let names = table.iter().flat_map(|(_, names)| names.iter().copied());
        let known = ["auto", "none"].into_iter().chain(names).collect::<Vec<_>>().join(", ");
        UnknownParser { given: given.to_owned(), known }
    })
}

impl FromStr for ParserChoice<ToolFormat> {
    type Err = UnknownParser;

    fn from_str(name: &str) -> Result<Self, UnknownParser> {
        choose(&TOOLS, name)
    }
}

impl FromStr for ParserChoice<ReasoningFormat> {
    type Err = UnknownParser;

    fn from_str(name: &str) -> Result<Self, UnknownParser> {
        choose(&REASONING, name)
    }
}

impl fmt::Display for ToolFormat {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let named = TOOLS.iter().find(|(format, _)| format == self);
        f.write_str(named.map_or("", |(_, names)| names[0]))
    }
}

impl fmt::Display for ReasoningFormat {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl<F: fmt::Display> fmt::Display for ParserChoice<F> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("none"),
            Self::Fixed(format) => format.fmt(f),
        }
    }
}

/// The formats that a chat template shows: how it would write the model's own earlier calls and thoughts.
///
/// A template with calls in a form that is not read here (Qwen3-Coder's and GLM's XML, DeepSeek's own marks) gives
/// `None`, and such calls stay text. [`ToolFormat::Json`] has no sign of its own: it is never found, only chosen.
pub fn detect(template_source: &str) -> (Option<ToolFormat>, Option<ReasoningFormat>) {
    let shows = |sign: &str| template_source.contains(sign);
    let tools = if shows("<tool_call>") {
        let xml = shows("<function=") || shows("<arg_key>");
        (!xml).then_some(ToolFormat::Hermes)
    } else if shows("[TOOL_CALLS]") {
        Some(ToolFormat::Mistral)
    } else if shows("[func_name1(") {
        Some(ToolFormat::Pythonic)
    } else if shows("{\"name\": function name, \"parameters\":") || shows("'\"parameters\": '") {
        Some(ToolFormat::Llama3Json)
    } else {
        None
    };
    let styles = [ReasoningFormat::SEED_OSS, ReasoningFormat::MISTRAL, ReasoningFormat::THINK];
    (tools, styles.into_iter().find(|style| shows(style.end)))
}
