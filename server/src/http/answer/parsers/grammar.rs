//! Grammars that make a model call a tool, in its own format, with arguments that its schema allows.

use serde_json::{Value, json};

use super::{ToolFormat, python_grammar};

/// A tool, as a request describes it.
#[derive(Debug, Clone)]
pub struct ToolDef {
    /// Its name.
    pub name: String,
    /// The JSON Schema of its arguments' object; null where the request gives none.
    pub parameters: Value,
}

/// Which tool must be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolChoice<'a> {
    /// Any of them (`tool_choice: "required"`).
    Required,
    /// This one.
    Named(&'a str),
}

/// What a grammar is made of.
#[derive(Clone, Copy)]
pub struct ToolGrammar<'a> {
    /// How the model writes calls.
    pub format: ToolFormat,
    /// The request's tools.
    pub tools: &'a [ToolDef],
    /// Which of them must be called.
    pub choice: ToolChoice<'a>,
    /// Whether several calls may be made.
    pub parallel: bool,
    /// The id of the special token with this text, if the tokenizer has one. A special token does not match its own text
    /// in a grammar, so the formats' marks are written as tokens where they are ones.
    pub special_token: &'a dyn Fn(&str) -> Option<u32>,
}

/// The grammar of an answer that calls tools, in llguidance's dialect of Lark.
///
/// What it accepts, [`super::AnswerParser`] reads as calls of the same format. Arguments are held to their whole
/// schema; the pythonic format holds them to names, types, constants and what is required, not to ranges or patterns.
///
/// # Errors
/// In words, when there is no tool, when the one to be called is not among them, or when a schema is not a JSON object.
pub fn tool_grammar(request: &ToolGrammar) -> Result<String, String> {
    let tools: Vec<&ToolDef> = match request.choice {
        ToolChoice::Required => request.tools.iter().collect(),
        ToolChoice::Named(name) => request.tools.iter().filter(|tool| tool.name == name).collect(),
    };
    if tools.is_empty() {
        return Err(match request.choice {
            ToolChoice::Required => "tool_choice requires a tool call, but there are no tools".to_owned(),
            ToolChoice::Named(name) => {
                format!("tool_choice names {name:?}, which is not among the request's tools")
            }
        });
    }
    let schemas = tools.iter().map(|tool| schema(tool)).collect::<Result<Vec<_>, _>>()?;
    if request.format == ToolFormat::Pythonic {
        return python_grammar::write(&tools, &schemas, request.parallel);
    }
    let mut lark = String::new();
    let form = Form::of(request);
    let more = form.between(request.parallel);
    lark.push_str(&format!("start: {} call{more} {}\n", form.before, form.after));
    let alternatives: Vec<String> = (0..tools.len()).map(|n| format!("call_{n}")).collect();
    lark.push_str(&format!("call: {}\n", alternatives.join(" | ")));
    for (n, (tool, schema)) in tools.iter().zip(&schemas).enumerate() {
        let name = match request.format {
            ToolFormat::Mistral if form.named => tool.name.clone(),
            _ => Value::from(tool.name.as_str()).to_string(),
        };
        let (head, tail) = form.around(&name);
        lark.push_str(&format!("call_{n}: {head} arguments_{n} {tail}\narguments_{n}: %json {schema}\n"));
    }
    Ok(lark)
}

/// The schema of a tool's arguments, which are an object whatever else it says.
fn schema(tool: &ToolDef) -> Result<Value, String> {
    match &tool.parameters {
        Value::Null => Ok(json!({ "type": "object", "properties": {}, "additionalProperties": false })),
        Value::Object(schema) => {
            let mut schema = schema.clone();
            match schema.get("type") {
                Some(kind) if kind != "object" => {
                    return Err(format!(
                        "the parameters of tool {:?} have type {kind}: a tool's arguments are an object",
                        tool.name
                    ));
                }
                _ => schema.insert("type".to_owned(), json!("object")),
            };
            Ok(Value::Object(schema))
        }
        _ => Err(format!("the parameters of tool {:?} are not a JSON Schema object", tool.name)),
    }
}

/// How a format writes its calls, in terms of the grammar.
struct Form {
    /// Before and after all calls, and between two.
    before: String,
    after: String,
    separator: String,
    /// Around each call.
    call_start: String,
    call_end: String,
    /// The key of the arguments.
    key: &'static str,
    /// Mistral's later form, with the name outside of the JSON.
    named: bool,
    arguments_mark: String,
}

impl Form {
    fn of(request: &ToolGrammar) -> Self {
        let mark = |text: &str| match (request.special_token)(text) {
            Some(id) => format!("<[{id}]>"),
            None => literal(text),
        };
        let mut form = Self {
            before: String::new(),
            after: String::new(),
            separator: String::new(),
            call_start: String::new(),
            call_end: String::new(),
            key: "arguments",
            named: false,
            arguments_mark: String::new(),
        };
        match request.format {
            ToolFormat::Hermes => {
                form.call_start = format!("{} {}", mark("<tool_call>"), literal("\n"));
                form.call_end = format!("{} {}", literal("\n"), mark("</tool_call>"));
                form.separator = literal("\n");
            }
            ToolFormat::Llama3Json => {
                form.key = "parameters";
                form.separator = literal("; ");
            }
            ToolFormat::Json => {
                form.before = literal("[");
                form.after = literal("]");
                form.separator = literal(", ");
            }
            ToolFormat::Mistral if (request.special_token)("[ARGS]").is_some() => {
                form.named = true;
                form.call_start = mark("[TOOL_CALLS]");
                form.arguments_mark = mark("[ARGS]");
            }
            ToolFormat::Mistral => {
                form.before = format!("{} {}", mark("[TOOL_CALLS]"), literal("["));
                form.after = literal("]");
                form.separator = literal(", ");
            }
            ToolFormat::Pythonic => {}
        }
        form
    }

    fn between(&self, parallel: bool) -> String {
        if parallel { format!(" ({} call)*", self.separator) } else { String::new() }
    }

    /// What stands before and after the arguments of a call of `name`.
    fn around(&self, name: &str) -> (String, String) {
        if self.named {
            return (format!("{} {} {}", self.call_start, literal(name), self.arguments_mark), String::new());
        }
        let head = literal(&format!("{{\"name\": {name}, \"{}\": ", self.key));
        (format!("{} {head}", self.call_start), format!("{} {}", literal("}"), self.call_end))
    }
}

/// Text as a literal of Lark, whose strings are JSON's; the one other character it refuses is DEL.
pub(super) fn literal(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}
