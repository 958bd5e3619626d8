//! The answer behind the thoughts: text with tool calls in it.

use std::sync::Arc;

use rand::{Rng, distr::Alphanumeric};

use super::{
    ParserConfig, Sink, ToolFormat,
    envelope::{Envelope, HERMES_END},
    markers::Markers,
    named::NamedCall,
    pythonic::PythonCall,
    text_of,
};

const HERMES_START: &str = "<tool_call>";
const LLAMA_START: &str = "<|python_tag|>";
const PYTHON_START: &str = "<|python_start|>";
const PYTHON_END: &str = "<|python_end|>";
const MISTRAL_START: &str = "[TOOL_CALLS]";

/// What a call reader says of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Taken; the call goes on.
    More,
    /// Taken; the call is complete.
    Done,
    /// Not taken: what was read is no call, or no longer one if it had begun.
    Reject,
}

/// The calls of one answer: what a call reader knows and writes to.
#[derive(Debug)]
pub(super) struct Calls {
    names: Arc<[String]>,
    pub format: Option<ToolFormat>,
    /// How many calls have begun.
    begun: usize,
    /// Whether the call that is being read has begun, so that it cannot become text any more.
    pub started: bool,
    /// What was read of a call that has not begun.
    raw: String,
    /// White space and punctuation beside calls: dropped when a call follows, text when text does.
    gap: String,
}

impl Calls {
    pub fn knows(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }

    /// Begins the call that is being read.
    pub fn start(&mut self, name: &str, out: &mut Sink) {
        out.start(self.begun, self.new_id(), name.to_owned());
        self.begun += 1;
        self.started = true;
        self.raw.clear();
        self.gap.clear();
    }

    /// More arguments of the call that was started last.
    pub fn arguments(&self, text: &str, out: &mut Sink) {
        out.arguments(self.begun.saturating_sub(1), text);
    }

    fn new_id(&self) -> String {
        let (prefix, length) = if self.format == Some(ToolFormat::Mistral) { ("", 9) } else { ("call_", 24) };
        let random = rand::rng().sample_iter(Alphanumeric).take(length).map(char::from);
        prefix.chars().chain(random).collect()
    }
}

#[derive(Debug)]
enum State {
    Text,
    /// A mark was read; the call itself comes next. `bracket`: whether a list was opened.
    Open {
        bracket: bool,
    },
    Json(Envelope),
    Python(PythonCall),
    Named(NamedCall),
}

/// What a marker in the text means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    /// A call follows.
    Begins,
    /// The call before it is over.
    Ends,
    /// A special token that means nothing here.
    Nothing,
}

/// Splits text and tool calls.
#[derive(Debug)]
pub(super) struct ToolReader {
    calls: Calls,
    state: State,
    markers: Markers,
    marker_texts: Vec<(String, Meaning)>,
    special: Arc<[String]>,
    /// Nothing but white space so far, so that a call without marks may begin.
    at_start: bool,
    /// Nothing but punctuation since a call, so that another may begin.
    after_call: bool,
    /// Within a list of calls, after a comma.
    after_comma: bool,
}

impl ToolReader {
    pub fn new(config: &ParserConfig) -> Self {
        let format = config.tools.filter(|_| !config.tool_names.is_empty());
        let mut marker_texts: Vec<(String, Meaning)> = match format {
            Some(ToolFormat::Hermes) => {
                vec![(HERMES_START.into(), Meaning::Begins), (HERMES_END.into(), Meaning::Ends)]
            }
            Some(ToolFormat::Llama3Json) => vec![(LLAMA_START.into(), Meaning::Begins)],
            Some(ToolFormat::Pythonic) => {
                vec![(PYTHON_START.into(), Meaning::Begins), (PYTHON_END.into(), Meaning::Ends)]
            }
            Some(ToolFormat::Mistral) => vec![(MISTRAL_START.into(), Meaning::Begins)],
            Some(ToolFormat::Json) | None => Vec::new(),
        };
        for token in config.special_tokens.iter() {
            if marker_texts.iter().all(|(text, _)| text != token) {
                marker_texts.push((token.clone(), Meaning::Nothing));
            }
        }
        Self {
            calls: Calls {
                names: config.tool_names.clone(),
                format,
                begun: 0,
                started: false,
                raw: String::new(),
                gap: String::new(),
            },
            state: State::Text,
            markers: Markers::new(marker_texts.iter().map(|(text, _)| text.clone()).collect()),
            marker_texts,
            special: config.special_tokens.clone(),
            at_start: true,
            after_call: false,
            after_comma: false,
        }
    }

    /// How many calls have begun.
    pub fn calls(&self) -> usize {
        self.calls.begun
    }

    pub fn step(&mut self, c: char, out: &mut Sink) {
        if !matches!(self.state, State::Text) {
            return self.step_call(c, out);
        }
        if self.markers.is_idle() && self.begins_bare(c) {
            return self.begin_bare(c, out);
        }
        if self.markers.is_free(c) {
            return self.text(c, out);
        }
        let found = self.markers.step(c);
        for c in found.free.chars() {
            self.text(c, out);
        }
        if let Some(marker) = found.marker {
            self.marker(marker, out);
        }
    }

    fn marker(&mut self, marker: usize, out: &mut Sink) {
        let (text, meaning) = self.marker_texts[marker].clone();
        let special = self.special.contains(&text);
        match meaning {
            Meaning::Begins => {
                if !special {
                    self.calls.raw.push_str(&text);
                }
                self.state = State::Open { bracket: false };
            }
            Meaning::Ends if self.after_call => self.calls.gap.clear(),
            Meaning::Ends | Meaning::Nothing if special => {}
            Meaning::Ends | Meaning::Nothing => text.chars().for_each(|c| self.text(c, out)),
        }
    }

    /// A character of the answer's text.
    fn text(&mut self, c: char, out: &mut Sink) {
        let Some(format) = self.calls.format else {
            return out.text(text_of(c, &mut [0; 4]));
        };
        if c.is_whitespace() || (self.after_call && is_litter(format, c)) {
            self.after_comma = c == ',' || (self.after_comma && c != ']');
            return self.calls.gap.push(c);
        }
        out.text(&std::mem::take(&mut self.calls.gap));
        out.text(text_of(c, &mut [0; 4]));
        self.at_start = false;
        self.after_call = false;
        self.after_comma = false;
    }

    /// Whether a call without a mark may begin with this character here.
    fn begins_bare(&self, c: char) -> bool {
        let here = self.at_start || self.after_call;
        match self.calls.format {
            Some(ToolFormat::Llama3Json) => c == '{' && here,
            Some(ToolFormat::Json) => (c == '{' || c == '[') && here,
            Some(ToolFormat::Mistral) => c == '{' && self.after_call,
            Some(ToolFormat::Pythonic) => {
                (c == '[' && self.at_start) || (self.after_call && self.after_comma && PythonCall::begins(c))
            }
            Some(ToolFormat::Hermes) | None => false,
        }
    }

    fn begin_bare(&mut self, c: char, out: &mut Sink) {
        let bare = !matches!(self.calls.format, Some(ToolFormat::Mistral));
        self.state = match c {
            '[' => {
                self.calls.raw.push(c);
                State::Open { bracket: true }
            }
            '{' => State::Json(Envelope::new(bare)),
            _ => State::Python(PythonCall::default()),
        };
        if c != '[' {
            self.step_call(c, out);
        }
    }

    /// A character behind a mark: what kind of call is it?
    fn open(&mut self, c: char, bracket: bool) -> Option<State> {
        let format = self.calls.format?;
        let bare = format == ToolFormat::Json;
        match (format, c) {
            (_, c) if c.is_whitespace() => Some(State::Open { bracket }),
            (ToolFormat::Mistral | ToolFormat::Pythonic, '[') if !bracket => {
                Some(State::Open { bracket: true })
            }
            (ToolFormat::Pythonic, c) if bracket && PythonCall::begins(c) => {
                Some(State::Python(PythonCall::default()))
            }
            (ToolFormat::Mistral, c) if !bracket && NamedCall::begins(c) => {
                Some(State::Named(NamedCall::default()))
            }
            (ToolFormat::Pythonic, _) => None,
            (_, '{') => Some(State::Json(Envelope::new(bare))),
            _ => None,
        }
    }

    fn step_call(&mut self, c: char, out: &mut Sink) {
        if let State::Open { bracket } = self.state {
            match self.open(c, bracket) {
                Some(open @ State::Open { .. }) => {
                    self.calls.raw.push(c);
                    self.state = open;
                    return;
                }
                Some(call) => self.state = call,
                None => return self.reject(c, out),
            }
        }
        let step = match &mut self.state {
            State::Json(call) => call.step(c, &mut self.calls, out),
            State::Python(call) => call.step(c, &mut self.calls, out),
            State::Named(call) => call.step(c, &mut self.calls, out),
            State::Text | State::Open { .. } => Step::Reject,
        };
        match step {
            Step::More if self.calls.started => {}
            Step::More => self.calls.raw.push(c),
            Step::Done => self.end_call(out),
            Step::Reject => self.reject(c, out),
        }
    }

    /// Back to text. A call that has begun stays one; anything else was text.
    fn end_call(&mut self, out: &mut Sink) {
        self.state = State::Text;
        if self.calls.started {
            self.calls.started = false;
            self.after_call = true;
        } else {
            out.text(&std::mem::take(&mut self.calls.gap));
            out.text(&std::mem::take(&mut self.calls.raw));
            self.after_call = false;
        }
        self.at_start = false;
        self.after_comma = false;
    }

    /// The call ended before this character, which is read again as text.
    fn reject(&mut self, c: char, out: &mut Sink) {
        self.end_call(out);
        self.step(c, out);
    }

    /// Ends the answer. An unfinished call that had begun keeps the arguments it has; one that had not is text.
    pub fn finish(&mut self, out: &mut Sink) {
        if let State::Json(call) = &mut self.state {
            call.finish(&self.calls, out);
        }
        if !matches!(self.state, State::Text) {
            self.end_call(out);
        }
        for c in self.markers.take().chars() {
            self.text(c, out);
        }
        if !self.after_call {
            out.text(&std::mem::take(&mut self.calls.gap));
        }
    }
}

/// Punctuation that may stand beside calls and means nothing there: separators, and brackets that a model closes once
/// too often.
fn is_litter(format: ToolFormat, c: char) -> bool {
    match format {
        ToolFormat::Hermes => matches!(c, '}' | ']'),
        _ => matches!(c, '}' | ']' | ',' | ';'),
    }
}
