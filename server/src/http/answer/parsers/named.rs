//! Mistral's later form of a call: `name[ARGS]{…}`, perhaps with `[CALL_ID]…` between.

use super::{
    Sink,
    scan::ValueScan,
    text_of,
    tools::{Calls, Step},
};

const LONGEST: usize = 256;

/// Reads one call after its mark. The call begins where its arguments do.
#[derive(Debug, Default)]
pub(super) struct NamedCall {
    at: At,
    name: String,
    text: String,
    value: ValueScan,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum At {
    #[default]
    Name,
    Tag,
    /// The model's own id of the call, which ours replaces.
    Id,
    Brace,
    Arguments,
}

impl NamedCall {
    /// Whether a call can begin with this character.
    pub fn begins(c: char) -> bool {
        c.is_ascii_alphanumeric() || c == '_'
    }

    pub fn step(&mut self, c: char, calls: &mut Calls, out: &mut Sink) -> Step {
        match (self.at, c) {
            (At::Arguments, _) => {
                calls.arguments(text_of(c, &mut [0; 4]), out);
                return if self.value.closes(c) { Step::Done } else { Step::More };
            }
            (At::Name, '[') if calls.knows(&self.name) => self.begin_tag(),
            (At::Name | At::Brace, '{') if calls.knows(&self.name) => {
                self.at = At::Arguments;
                calls.start(&self.name, out);
                return self.step(c, calls, out);
            }
            (At::Name, _) if self.name.len() < LONGEST && (Self::begins(c) || matches!(c, '-' | '.')) => {
                self.name.push(c);
            }
            (At::Tag, ']') if self.text == "ARGS" => self.at = At::Brace,
            (At::Tag, ']') if self.text == "CALL_ID" => {
                self.text.clear();
                self.at = At::Id;
            }
            (At::Tag, 'A'..='Z' | '_') if self.text.len() < LONGEST => self.text.push(c),
            (At::Id, '[') => self.begin_tag(),
            (At::Id, _) if self.text.len() < LONGEST && c.is_ascii_alphanumeric() => self.text.push(c),
            (At::Brace, ' ' | '\n') => {}
            _ => return Step::Reject,
        }
        Step::More
    }

    fn begin_tag(&mut self) {
        self.text.clear();
        self.at = At::Tag;
    }
}
