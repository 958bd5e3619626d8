//! A call as a JSON object: `{"name": …, "arguments": {…}}`, read and passed on while it is written.

use super::{
    Sink, ToolFormat,
    scan::{StringScan, ValueScan, decode},
    text_of,
    tools::{Calls, Step},
};

/// Ends a call in the Hermes format.
pub(super) const HERMES_END: &str = "</tool_call>";

/// Longer keys and names are none of a call's.
const LONGEST_NAME: usize = 512;

/// Reads one object. The call begins once its name is known to be a tool's and its arguments have begun.
#[derive(Debug)]
pub(super) struct Envelope {
    at: At,
    /// Without a mark before it, the object may as well be an ordinary answer in JSON: only a call's own keys are taken,
    /// and arguments are required.
    bare: bool,
    key: String,
    name: Option<String>,
    /// Arguments that came before the name.
    waiting: Option<String>,
    /// Whether all arguments were read.
    has_arguments: bool,
    string: StringScan,
    value: ValueScan,
    text: String,
    /// Within arguments and outside of strings: the beginning of the mark that ends a call.
    end: String,
}

/// Where in the object the reader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Open,
    FirstKey,
    NextKey,
    Key,
    Colon,
    Value,
    Name,
    Arguments,
    ArgumentsText,
    OtherText,
    OtherNested,
    OtherPlain,
    Null,
    Comma,
}

impl Envelope {
    pub fn new(bare: bool) -> Self {
        Self {
            at: At::Open,
            bare,
            key: String::new(),
            name: None,
            waiting: None,
            has_arguments: false,
            string: StringScan::default(),
            value: ValueScan::default(),
            text: String::new(),
            end: String::new(),
        }
    }

    pub fn step(&mut self, c: char, calls: &mut Calls, out: &mut Sink) -> Step {
        match self.at {
            At::Arguments => return self.arguments(c, calls, out),
            At::Key | At::Name | At::ArgumentsText | At::OtherText => return self.string(c, calls, out),
            At::OtherNested => {
                if self.value.closes(c) {
                    self.at = At::Comma;
                }
                return Step::More;
            }
            At::OtherPlain | At::Null if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+') => {
                return self.plain(c);
            }
            At::OtherPlain | At::Null => {
                if self.at == At::Null && self.text != "null" {
                    return Step::Reject;
                }
                self.at = At::Comma;
            }
            _ => {}
        }
        if matches!(c, ' ' | '\t' | '\n' | '\r') {
            return Step::More;
        }
        match (self.at, c) {
            (At::Open, '{') => self.at = At::FirstKey,
            (At::FirstKey | At::NextKey, '"') => self.begin_string(At::Key),
            (At::Colon, ':') => self.at = At::Value,
            (At::Value, _) => return self.value(c, calls, out),
            (At::Comma, ',') => self.at = At::NextKey,
            (At::Comma | At::FirstKey, '}') => return self.close(calls, out),
            _ => return Step::Reject,
        }
        Step::More
    }

    fn begin_string(&mut self, at: At) {
        self.at = at;
        self.string = StringScan::default();
        self.text.clear();
    }

    /// A character within a string: a key, the name, arguments written as text, or anything else.
    fn string(&mut self, c: char, calls: &mut Calls, out: &mut Sink) -> Step {
        if !self.string.closes(c) {
            match self.at {
                At::OtherText => {}
                At::Key | At::Name if self.text.len() > LONGEST_NAME => return Step::Reject,
                _ => self.text.push(c),
            }
            return Step::More;
        }
        match self.at {
            At::Key => {
                let Some(key) = decode(&self.text) else { return Step::Reject };
                let ours = matches!(key.as_str(), "name" | "arguments" | "parameters" | "type" | "id");
                if self.bare && !calls.started && !ours {
                    return Step::Reject;
                }
                self.key = key;
                self.at = At::Colon;
            }
            At::Name => {
                let Some(name) = decode(&self.text).filter(|name| calls.knows(name)) else {
                    return Step::Reject;
                };
                if let Some(arguments) = self.waiting.take() {
                    calls.start(&name, out);
                    calls.arguments(&arguments, out);
                }
                self.name = Some(name);
                self.at = At::Comma;
            }
            At::ArgumentsText => return self.arguments_text(calls, out),
            _ => self.at = At::Comma,
        }
        Step::More
    }

    /// The first character of a value: what it is decides how it is read.
    fn value(&mut self, c: char, calls: &mut Calls, out: &mut Sink) -> Step {
        let names = self.key == "name" && self.name.is_none();
        let argues = matches!(self.key.as_str(), "arguments" | "parameters") && !self.has_arguments;
        match c {
            '"' if names => self.begin_string(At::Name),
            _ if names => return Step::Reject,
            '{' if argues => return self.begin_arguments(calls, out),
            '"' if argues => self.begin_string(At::ArgumentsText),
            'n' if argues => {
                self.at = At::Null;
                self.text = "n".to_owned();
            }
            _ if argues => return Step::Reject,
            '"' => self.begin_string(At::OtherText),
            _ if self.bare && !calls.started => return Step::Reject,
            '{' | '[' => {
                self.at = At::OtherNested;
                self.value = ValueScan::default();
                self.value.closes(c);
            }
            _ if c.is_ascii_alphanumeric() || c == '-' => self.at = At::OtherPlain,
            _ => return Step::Reject,
        }
        Step::More
    }

    /// A number or a word.
    fn plain(&mut self, c: char) -> Step {
        if self.at == At::Null {
            self.text.push(c);
            if !"null".starts_with(&self.text) {
                return Step::Reject;
            }
            // No arguments at all, said outright: the object that closes the call counts as complete.
            self.has_arguments = self.text == "null";
            if self.has_arguments {
                self.waiting = Some("{}".to_owned());
            }
        }
        Step::More
    }

    fn begin_arguments(&mut self, calls: &mut Calls, out: &mut Sink) -> Step {
        self.at = At::Arguments;
        self.value = ValueScan::default();
        self.value.closes('{');
        self.text.clear();
        if let Some(name) = &self.name {
            calls.start(name, out);
        }
        self.write("{", calls, out);
        Step::More
    }

    /// Passes arguments on, or keeps them until the name is known.
    fn write(&mut self, text: &str, calls: &Calls, out: &mut Sink) {
        if calls.started {
            calls.arguments(text, out);
        } else {
            self.text.push_str(text);
        }
    }

    /// A character of the arguments' object.
    fn arguments(&mut self, c: char, calls: &mut Calls, out: &mut Sink) -> Step {
        let may_end = calls.format == Some(ToolFormat::Hermes) && self.value.is_outside_strings();
        if may_end && (c == '<' || !self.end.is_empty()) {
            self.end.push(c);
            if self.end == HERMES_END {
                // The object never closed: bad JSON, and all there will be of it.
                return if calls.started { Step::Done } else { Step::Reject };
            }
            if HERMES_END.starts_with(&self.end) {
                return Step::More;
            }
            self.end.pop();
            let held = std::mem::take(&mut self.end);
            self.write(&held, calls, out);
            if c == '<' {
                self.end.push(c);
                return Step::More;
            }
        }
        self.write(text_of(c, &mut [0; 4]), calls, out);
        if self.value.closes(c) {
            self.at = At::Comma;
            self.has_arguments = true;
            if !calls.started {
                self.waiting = Some(std::mem::take(&mut self.text));
            }
        }
        Step::More
    }

    /// The end of arguments that the model wrote as text with JSON in it, which is passed on decoded.
    fn arguments_text(&mut self, calls: &mut Calls, out: &mut Sink) -> Step {
        let Some(mut arguments) = decode(&self.text) else { return Step::Reject };
        if arguments.trim().is_empty() {
            arguments = "{}".to_owned();
        }
        if serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&arguments).is_err() {
            return Step::Reject;
        }
        self.has_arguments = true;
        self.at = At::Comma;
        match &self.name {
            Some(name) => {
                calls.start(name, out);
                calls.arguments(&arguments, out);
            }
            None => self.waiting = Some(arguments),
        }
        Step::More
    }

    /// The object's end. A call behind a mark may leave its arguments out.
    fn close(&mut self, calls: &mut Calls, out: &mut Sink) -> Step {
        if calls.started {
            return Step::Done;
        }
        let Some(name) = self.name.take() else { return Step::Reject };
        if !self.has_arguments && self.bare {
            return Step::Reject;
        }
        calls.start(&name, out);
        calls.arguments("{}", out);
        Step::Done
    }

    /// The answer ends here: what was held back of begun arguments belongs to them.
    pub fn finish(&mut self, calls: &Calls, out: &mut Sink) {
        if calls.started {
            calls.arguments(&std::mem::take(&mut self.end), out);
        }
    }
}
