//! Placeholder until the parsers land.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    Hermes,
    Json,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReasoningFormat {
    pub start: String,
    pub end: String,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Reasoning(String),
    Text(String),
    ToolCallStart { index: usize, id: String, name: String },
    ToolCallArguments { index: usize, fragment: String },
}
#[derive(Debug, Clone, Default)]
pub struct ParserConfig {
    pub reasoning: Option<ReasoningFormat>,
    pub tools: Option<ToolFormat>,
    pub starts_in_reasoning: bool,
    pub tool_names: Vec<String>,
}
#[derive(Debug)]
pub struct AnswerParser;
impl AnswerParser {
    pub fn new(_: &ParserConfig) -> Self {
        Self
    }
    pub fn push(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        if !text.is_empty() {
            pieces.push(Piece::Text(text.to_owned()))
        }
    }
    pub fn finish(&mut self, _: &mut Vec<Piece>) {}
    pub fn called_tools(&self) -> bool {
        false
    }
}
pub fn detect(_: &str) -> (Option<ToolFormat>, Option<ReasoningFormat>) {
    (None, None)
}
pub mod ebnf {
    /// Placeholder.
    pub fn to_lark(grammar: &str) -> Result<String, String> {
        Ok(grammar.to_owned())
    }
}
pub struct ToolDef {
    pub name: String,
    pub parameters: serde_json::Value,
}
pub enum ToolChoice {
    Required,
    Named(String),
}
pub fn tool_grammar(
    _: ToolFormat,
    _: &[ToolDef],
    _: &ToolChoice,
    _: bool,
    _: &dyn Fn(&str) -> bool,
) -> Result<String, String> {
    Err("not yet".into())
}
impl ParserConfig {
    pub fn markers(&self) -> Vec<String> {
        Vec::new()
    }
}
impl std::str::FromStr for ToolFormat {
    type Err = String;
    fn from_str(_: &str) -> Result<Self, String> {
        Err("not yet".into())
    }
}
impl std::str::FromStr for ReasoningFormat {
    type Err = String;
    fn from_str(_: &str) -> Result<Self, String> {
        Err("not yet".into())
    }
}
