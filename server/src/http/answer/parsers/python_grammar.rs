//! The grammar of Python calls with keyword arguments, from the JSON Schemas of their tools.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::grammar::{ToolDef, literal};

/// Schemas within schemas, which the writer follows by recursion.
const DEEPEST: usize = 32;

/// Rules that every such grammar ends with: literals of any kind.
const LITERALS: &str = r#"
any: TEXT | NUMBER | TRUE | FALSE | NONE | "[" [any ("," SPACE? any)*] "]" | "{" [entry ("," SPACE? entry)*] "}"
entry: TEXT ":" SPACE? any
SPACE: " "
TEXT: /"([^"\\\x00-\x1f\x7f]|\\[nrt"'\\])*"/ | /'([^'\\\x00-\x1f\x7f]|\\[nrt"'\\])*'/
INTEGER: /-?(0|[1-9][0-9]{0,30})/
NUMBER: /-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?/
TRUE: "True"
FALSE: "False"
NONE: "None"
"#;

/// The grammar of a list of calls, each with arguments that its schema's names, types and constants allow.
///
/// Arguments come in the order in which the schema has them. A schema without properties takes any names.
pub(super) fn write(tools: &[&ToolDef], schemas: &[Value], parallel: bool) -> Result<String, String> {
    let more = if parallel { " (\",\" SPACE call)*" } else { "" };
    let calls: Vec<String> = (0..tools.len()).map(|n| format!("call_{n}")).collect();
    let mut lark = format!("start: \"[\" call{more} \"]\"\ncall: {}\n", calls.join(" | "));
    for (n, (tool, schema)) in tools.iter().zip(schemas).enumerate() {
        let mut writer =
            Writer { tool: n, root: schema, rules: String::new(), count: 0, defined: HashMap::new() };
        let arguments = writer.members(schema, Members::Keywords, 0)?;
        lark.push_str(&format!(
            "call_{n}: {} {arguments} \")\"\n{}",
            literal(&format!("{}(", tool.name)),
            writer.rules
        ));
    }
    lark.push_str(LITERALS);
    Ok(lark)
}

/// How an object's members are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Members {
    /// `name=value`
    Keywords,
    /// `"name": value`
    Entries,
}

struct Writer<'a> {
    tool: usize,
    root: &'a Value,
    rules: String,
    count: usize,
    /// Rules of `$ref`s, so that a schema may refer to itself.
    defined: HashMap<String, String>,
}

impl<'a> Writer<'a> {
    fn rule(&mut self) -> String {
        self.count += 1;
        format!("value_{}_{}", self.tool, self.count)
    }

    /// Writes a rule and gives its name.
    fn define(&mut self, body: &str) -> String {
        let name = self.rule();
        self.rules.push_str(&format!("{name}: {body}\n"));
        name
    }

    /// An expression for a value of this schema.
    fn value(&mut self, schema: &'a Value, depth: usize) -> Result<String, String> {
        let Value::Object(schema_map) = schema else { return Ok("any".to_owned()) };
        if depth > DEEPEST {
            return Err(format!("a tool's schema is nested deeper than {DEEPEST}"));
        }
        if let Some(Value::String(target)) = schema_map.get("$ref") {
            return self.reference(target, depth);
        }
        if let Some(constant) = schema_map.get("const") {
            return Ok(literal(&python(constant)));
        }
        if let Some(Value::Array(constants)) = schema_map.get("enum").filter(|list| **list != json!([])) {
            let all: Vec<String> = constants.iter().map(|constant| literal(&python(constant))).collect();
            return Ok(format!("({})", all.join(" | ")));
        }
        for key in ["anyOf", "oneOf"] {
            if let Some(Value::Array(schemas)) = schema_map.get(key).filter(|list| **list != json!([])) {
                let all = schemas
                    .iter()
                    .map(|schema| self.value(schema, depth + 1))
                    .collect::<Result<Vec<_>, _>>()?;
                return Ok(self.define(&all.join(" | ")));
            }
        }
        match schema_map.get("type") {
            Some(Value::Array(kinds)) => {
                let all = kinds
                    .iter()
                    .map(|kind| self.typed(kind, schema, depth))
                    .collect::<Result<Vec<_>, _>>()?;
                Ok(self.define(&all.join(" | ")))
            }
            Some(kind) => self.typed(kind, schema, depth),
            None if schema_map.contains_key("properties") => self.typed(&json!("object"), schema, depth),
            None => Ok("any".to_owned()),
        }
    }

    fn typed(&mut self, kind: &Value, schema: &'a Value, depth: usize) -> Result<String, String> {
        Ok(match kind.as_str() {
            Some("string") => "TEXT".to_owned(),
            Some("integer") => "INTEGER".to_owned(),
            Some("number") => "NUMBER".to_owned(),
            Some("boolean") => "(TRUE | FALSE)".to_owned(),
            Some("null") => "NONE".to_owned(),
            Some("array") => {
                let item = match schema.get("items") {
                    Some(items) => self.value(items, depth + 1)?,
                    None => "any".to_owned(),
                };
                let some = schema.get("minItems").and_then(Value::as_u64).is_some_and(|least| least > 0);
                let items = format!("{item} (\",\" SPACE? {item})*");
                self.define(&if some {
                    format!("\"[\" {items} \"]\"")
                } else {
                    format!("\"[\" [{items}] \"]\"")
                })
            }
            Some("object") => {
                let members = self.members(schema, Members::Entries, depth + 1)?;
                self.define(&format!("\"{{\" {members} \"}}\""))
            }
            _ => return Err(format!("a tool's schema has the unknown type {kind}")),
        })
    }

    fn reference(&mut self, target: &str, depth: usize) -> Result<String, String> {
        if let Some(rule) = self.defined.get(target) {
            return Ok(rule.clone());
        }
        let schema = target
            .strip_prefix('#')
            .and_then(|pointer| self.root.pointer(pointer))
            .ok_or_else(|| format!("a tool's schema refers to {target:?}, which it does not contain"))?;
        let rule = self.rule();
        self.defined.insert(target.to_owned(), rule.clone());
        let body = self.value(schema, depth + 1)?;
        self.rules.push_str(&format!("{rule}: {body}\n"));
        Ok(rule)
    }

    /// An object's members without the brackets around them, in the schema's order. Each property has a rule for the
    /// rest of the members from there on when none was written yet, and one for when a comma is due.
    fn members(&mut self, schema: &'a Value, form: Members, depth: usize) -> Result<String, String> {
        let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
            return Ok(match form {
                _ if schema.get("additionalProperties") == Some(&json!(false)) => "\"\"".to_owned(),
                Members::Entries => "[entry (\",\" SPACE? entry)*]".to_owned(),
                Members::Keywords => {
                    let keyword = self.define("/[a-zA-Z_][a-zA-Z0-9_]{0,63}/ \"=\" any");
                    format!("[{keyword} (\",\" SPACE? {keyword})*]")
                }
            });
        };
        let required: Vec<&str> = match schema.get("required") {
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        if let Some(name) = required.iter().find(|name| !properties.contains_key(**name)) {
            return Err(format!("a tool's schema requires {name:?}, which is not among its properties"));
        }
        let (mut first, mut later) = ("\"\"".to_owned(), "\"\"".to_owned());
        for (name, schema) in properties.iter().rev() {
            if form == Members::Keywords && !is_keyword(name) {
                return Err(format!("a pythonic call has no way to write the argument {name:?}"));
            }
            let value = self.value(schema, depth + 1)?;
            let head = match form {
                Members::Keywords => literal(&format!("{name}=")),
                Members::Entries => literal(&format!("{}: ", python(&json!(name)))),
            };
            let (begin, go_on) =
                (format!("{head} {value} {later}"), format!("\", \" {head} {value} {later}"));
            (first, later) = if required.contains(&name.as_str()) {
                (self.define(&begin), self.define(&go_on))
            } else {
                (self.define(&format!("{begin} | {first}")), self.define(&format!("{go_on} | {later}")))
            };
        }
        Ok(first)
    }
}

/// Whether Python takes a name as a keyword argument's.
fn is_keyword(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// A JSON value as Python writes it. JSON's strings are Python's too.
fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(_) | Value::String(_) => value.to_string(),
        Value::Array(items) => format!("[{}]", items.iter().map(python).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let entries = map.iter().map(|(key, item)| format!("{}: {}", json!(key), python(item)));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
    }
}
