//! What a client gave, as llguidance takes it; and what is refused before any time is spent on it.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use crate::{request::limits, structured::Structured};

/// Brackets that may stand in one another in a Lark grammar: its compiler is recursive.
const MAX_NESTING: usize = 200;

/// White space between the parts of a JSON text. Without a bound a model that has lost its way fills its answer with it; a new line and eleven
/// levels of four have room.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,48}";

/// Bytes of what a client gave.
pub(super) fn bytes(structured: &Structured) -> usize {
    match structured {
        Structured::JsonObject => 0,
        Structured::JsonSchema(text) | Structured::Regex(text) | Structured::Lark(text) => text.len(),
        Structured::Choice(texts) => texts.iter().map(|text| text.len() + 8).sum(),
    }
}

/// Refuses what is too large, or says nothing.
pub(super) fn check(structured: &Structured) -> Result<(), String> {
    let bytes = bytes(structured);
    if bytes > limits::MAX_STRUCTURED_BYTES {
        return Err(format!("has {bytes} bytes; at most {}", limits::MAX_STRUCTURED_BYTES));
    }
    match structured {
        Structured::Choice(texts) if texts.is_empty() => Err("a choice of nothing; give a text".into()),
        Structured::Choice(texts) if texts.iter().any(String::is_empty) => {
            Err("a choice holds an empty text".into())
        }
        Structured::Regex(text) | Structured::Lark(text) if text.trim().is_empty() => {
            Err("is empty; say what the text shall match".into())
        }
        Structured::Lark(text) if nesting(text) > MAX_NESTING => {
            Err(format!("a grammar with over {MAX_NESTING} brackets in one another"))
        }
        _ => Ok(()),
    }
}

/// The most brackets that may be open at once: those in texts count, too.
fn nesting(text: &str) -> usize {
    let (mut depth, mut most) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        most = most.max(depth);
    }
    most
}

/// The grammar of a form.
pub(super) fn grammar(structured: &Structured) -> Result<TopLevelGrammar, String> {
    match structured {
        Structured::JsonObject => Ok(TopLevelGrammar::from_json_schema(spaced(json!({ "type": "object" })))),
        Structured::JsonSchema(text) => schema(text),
        Structured::Regex(text) => Ok(TopLevelGrammar::from_regex(whole(text))),
        Structured::Choice(texts) => choice(texts),
        Structured::Lark(text) => Ok(TopLevelGrammar::from_lark(text.to_string())),
    }
}

fn schema(text: &str) -> Result<TopLevelGrammar, String> {
    let schema: Value = serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
    match schema {
        Value::Bool(true) => Ok(TopLevelGrammar::from_json_schema(spaced(json!({})))),
        Value::Object(_) => Ok(TopLevelGrammar::from_json_schema(spaced(schema))),
        Value::Bool(false) => Err("nothing is valid under the schema `false`".into()),
        _ => Err("a JSON Schema is an object or a boolean".into()),
    }
}

/// With our rule for white space, unless the schema has its own.
fn spaced(mut schema: Value) -> Value {
    if let Value::Object(members) = &mut schema
        && !members.contains_key("x-guidance")
    {
        members.insert("x-guidance".into(), json!({ "whitespace_pattern": WHITESPACE }));
    }
    schema
}

/// An expression without anchors at its ends: it is matched whole, and llguidance knows none.
fn whole(expression: &str) -> &str {
    let expression = expression.strip_prefix('^').unwrap_or(expression);
    match expression.strip_suffix('$') {
        Some(rest) if rest.bytes().rev().take_while(|&byte| byte == b'\\').count().is_multiple_of(2) => rest,
        _ => expression,
    }
}

/// One terminal, so that the lexer reads all texts side by side.
fn choice(texts: &[String]) -> Result<TopLevelGrammar, String> {
    let quoted: Result<Vec<String>, _> = texts.iter().map(serde_json::to_string).collect();
    let quoted = quoted.map_err(|error| error.to_string())?;
    Ok(TopLevelGrammar::from_lark(format!("start: CHOICE\nCHOICE: {}\n", quoted.join(" | "))))
}
