//! A call as Python writes one, `f(a=1, b="x")`, turned into JSON when its last bracket closes.

use super::{
    Sink,
    tools::{Calls, Step},
};

const LONGEST_NAME: usize = 256;
/// Brackets within brackets, which the reader follows by recursion.
const DEEPEST: usize = 64;

/// Reads one call of a list. The call begins, with all its arguments, when it is complete and can be read.
#[derive(Debug, Default)]
pub(super) struct PythonCall {
    name: String,
    /// The text between the brackets; `None` before the first.
    body: Option<String>,
    depth: usize,
    quote: Option<char>,
    escaped: bool,
}

impl PythonCall {
    /// Whether a call can begin with this character.
    pub fn begins(c: char) -> bool {
        c.is_ascii_alphabetic() || c == '_'
    }

    pub fn step(&mut self, c: char, calls: &mut Calls, out: &mut Sink) -> Step {
        let Some(body) = &mut self.body else {
            match c {
                '(' if calls.knows(&self.name) => self.body = Some(String::new()),
                'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '-' | '.' if self.name.len() < LONGEST_NAME => {
                    self.name.push(c);
                }
                _ => return Step::Reject,
            }
            return Step::More;
        };
        if let Some(quote) = self.quote {
            if c == quote && !self.escaped {
                self.quote = None;
            }
            self.escaped = c == '\\' && !self.escaped;
        } else {
            match c {
                '"' | '\'' => self.quote = Some(c),
                '(' | '[' | '{' => self.depth += 1,
                ')' if self.depth == 0 => {
                    let Some(arguments) = arguments(body) else { return Step::Reject };
                    calls.start(&self.name, out);
                    calls.arguments(&arguments, out);
                    return Step::Done;
                }
                ')' | ']' | '}' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
        body.push(c);
        Step::More
    }
}

/// The JSON object for a call's keyword arguments, or `None` where they are not literals that JSON has.
fn arguments(body: &str) -> Option<String> {
    let mut reader = Reader { rest: body, json: String::with_capacity(body.len() + 2) };
    let mut names: Vec<&str> = Vec::new();
    reader.json.push('{');
    reader.space();
    while !reader.rest.is_empty() {
        let length = reader.rest.find(|c: char| !c.is_alphanumeric() && c != '_')?;
        let name = reader.rest.get(..length).filter(|name| !name.is_empty())?;
        names.push(name);
        reader.rest = &reader.rest[length..];
        reader.key(&serde_json::to_string(name).ok()?, '=')?;
        reader.value(0)?;
        reader.space();
        if !reader.rest.is_empty() {
            reader.take(',')?;
            reader.separate();
        }
    }
    reader.unseparate();
    reader.json.push('}');
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    (names.len() == count).then_some(reader.json)
}

/// Reads Python's literals and writes JSON.
struct Reader<'a> {
    rest: &'a str,
    json: String,
}

impl Reader<'_> {
    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    /// The given sign, behind white space.
    fn take(&mut self, sign: char) -> Option<()> {
        self.space();
        self.rest = self.rest.strip_prefix(sign)?;
        Some(())
    }

    /// A comma in JSON, perhaps one too many as Python allows it: see [`Self::unseparate`].
    fn separate(&mut self) {
        self.json.push_str(", ");
        self.space();
    }

    fn unseparate(&mut self) {
        if self.json.ends_with(", ") {
            self.json.truncate(self.json.len() - 2);
        }
    }

    fn key(&mut self, json: &str, sign: char) -> Option<()> {
        self.take(sign)?;
        self.json.push_str(json);
        self.json.push_str(": ");
        Some(())
    }

    fn value(&mut self, depth: usize) -> Option<()> {
        self.space();
        match self.rest.chars().next()? {
            _ if depth > DEEPEST => None,
            '[' => self.list('[', ']', depth),
            '(' => self.list('(', ')', depth),
            '{' => self.dictionary(depth),
            '"' | '\'' => {
                let text = self.string()?;
                self.json.push_str(&serde_json::to_string(&text).ok()?);
                Some(())
            }
            c if c.is_ascii_alphabetic() => self.word(),
            _ => self.number(),
        }
    }

    fn list(&mut self, open: char, close: char, depth: usize) -> Option<()> {
        self.take(open)?;
        self.json.push('[');
        self.space();
        while !self.rest.starts_with(close) {
            self.value(depth + 1)?;
            self.space();
            if !self.rest.starts_with(close) {
                self.take(',')?;
                self.separate();
            }
        }
        self.unseparate();
        self.json.push(']');
        self.take(close)
    }

    fn dictionary(&mut self, depth: usize) -> Option<()> {
        self.take('{')?;
        self.json.push('{');
        self.space();
        while !self.rest.starts_with('}') {
            let key = self.string()?;
            self.key(&serde_json::to_string(&key).ok()?, ':')?;
            self.value(depth + 1)?;
            self.space();
            if !self.rest.starts_with('}') {
                self.take(',')?;
                self.separate();
            }
        }
        self.unseparate();
        self.json.push('}');
        self.take('}')
    }

    /// Python's constants, and JSON's names for them, which models mix in.
    fn word(&mut self) -> Option<()> {
        let length = self.rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(length);
        self.json.push_str(match word {
            "True" | "true" => "true",
            "False" | "false" => "false",
            "None" | "null" => "null",
            _ => return None,
        });
        self.rest = rest;
        Some(())
    }

    /// A number. Python's `.5`, `5.` and `+5` become JSON's `0.5`, `5.0` and `5`.
    fn number(&mut self) -> Option<()> {
        let end = self.rest.find(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '-' | '+'));
        let (text, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        let (sign, digits) = match text.strip_prefix('-') {
            Some(digits) => ("-", digits),
            None => ("", text.strip_prefix('+').unwrap_or(text)),
        };
        let zero = if digits.starts_with('.') { "0" } else { "" };
        let mut number = format!("{sign}{zero}{digits}");
        if number.ends_with('.') {
            number.push('0');
        }
        serde_json::from_str::<serde_json::Number>(&number).ok()?;
        self.json.push_str(&number);
        self.rest = rest;
        Some(())
    }

    /// A string in single or double quotes, decoded.
    fn string(&mut self) -> Option<String> {
        let quote = self.rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let mut chars = self.rest[1..].chars();
        let mut text = String::new();
        loop {
            match chars.next()? {
                c if c == quote => break,
                '\\' => escape(&mut chars, &mut text)?,
                c => text.push(c),
            }
        }
        self.rest = chars.as_str();
        Some(text)
    }
}

/// Decodes what follows a backslash ("The Python Language Reference", 2.4.1: an unknown escape keeps its backslash).
fn escape(chars: &mut std::str::Chars, text: &mut String) -> Option<()> {
    let c = chars.next()?;
    let decoded = match c {
        'n' => '\n',
        't' => '\t',
        'r' => '\r',
        'b' => '\u{8}',
        'f' => '\u{c}',
        'v' => '\u{b}',
        'a' => '\u{7}',
        '0' => '\0',
        '\\' | '\'' | '"' => c,
        '\n' => return Some(()),
        'x' => char::from_u32(hexadecimal(chars, 2)?)?,
        'U' => char::from_u32(hexadecimal(chars, 8)?)?,
        'u' => match hexadecimal(chars, 4)? {
            high @ 0xd800..=0xdbff => {
                // Written as JSON writes it, in two halves.
                (chars.next()? == '\\' && chars.next()? == 'u').then_some(())?;
                let low = hexadecimal(chars, 4)?.checked_sub(0xdc00).filter(|low| *low < 0x400)?;
                char::from_u32(0x10000 + ((high - 0xd800) << 10) + low)?
            }
            code => char::from_u32(code)?,
        },
        other => {
            text.push('\\');
            other
        }
    };
    text.push(decoded);
    Some(())
}

fn hexadecimal(chars: &mut std::str::Chars, digits: usize) -> Option<u32> {
    (0..digits).try_fold(0, |number, _| Some(number * 16 + chars.next()?.to_digit(16)?))
}
