//! The thoughts at the beginning of an answer.

use super::{ParserConfig, ReasoningFormat, Sink, markers::Markers, text_of, tools::ToolReader};

/// White space that may come before the opening mark; more than this is text.
const MOST_LEADING_SPACE: usize = 64;

/// Splits thoughts from the answer and passes the answer on.
///
/// Thoughts are looked for at the answer's beginning alone: a mark that an answer quotes later is text. Newlines beside
/// the marks belong to the marks.
#[derive(Debug)]
pub(super) struct Thoughts {
    stage: Stage,
    start: String,
    /// The closing mark and, behind it, the special tokens.
    end: Markers,
}

#[derive(Debug)]
enum Stage {
    /// Nothing but white space and perhaps a part of the opening mark was seen.
    Before { held: String, opened: bool },
    /// Within the thoughts. `newlines` are held, for they are dropped when the closing mark follows.
    Inside { fresh: bool, newlines: usize },
    /// The closing mark was just seen: newlines are dropped.
    Closed,
    /// Everything from here on is the answer.
    After,
}

impl Thoughts {
    pub fn new(config: &ParserConfig) -> Self {
        match config.reasoning {
            None => Self { stage: Stage::After, start: String::new(), end: Markers::new(Vec::new()) },
            Some(ReasoningFormat { start, end, .. }) => Self {
                stage: Stage::Before { held: String::new(), opened: config.starts_in_reasoning },
                start: start.to_owned(),
                end: Markers::new(
                    std::iter::once(end.to_owned()).chain(config.special_tokens.iter().cloned()).collect(),
                ),
            },
        }
    }

    pub fn step(&mut self, c: char, answer: &mut ToolReader, out: &mut Sink) {
        match &mut self.stage {
            Stage::After => answer.step(c, out),
            Stage::Closed if c == '\n' => {}
            Stage::Closed => {
                self.stage = Stage::After;
                answer.step(c, out);
            }
            Stage::Before { held, .. } => {
                held.push(c);
                let mark = held.trim_start();
                if mark == self.start {
                    self.stage = Stage::Inside { fresh: true, newlines: 0 };
                } else if !self.start.starts_with(mark) || held.len() - mark.len() > MOST_LEADING_SPACE {
                    self.begin_without_mark(answer, out);
                }
            }
            Stage::Inside { .. } => self.think(c, out),
        }
    }

    /// The answer does not begin with the opening mark: it begins within the thoughts, or has none.
    fn begin_without_mark(&mut self, answer: &mut ToolReader, out: &mut Sink) {
        let Stage::Before { held, opened } = &mut self.stage else { return };
        let held = std::mem::take(held);
        self.stage = if *opened { Stage::Inside { fresh: true, newlines: 0 } } else { Stage::After };
        for c in held.chars() {
            self.step(c, answer, out);
        }
    }

    fn think(&mut self, c: char, out: &mut Sink) {
        let found = self.end.step(c);
        for c in found.free.chars() {
            self.thought(c, out);
        }
        // The closing mark is the first marker; any other is a special token, which is left out.
        if found.marker == Some(0) {
            self.stage = Stage::Closed;
        }
    }

    /// A character that belongs to no mark.
    fn thought(&mut self, c: char, out: &mut Sink) {
        let Stage::Inside { fresh, newlines } = &mut self.stage else { return };
        if c == '\n' {
            *newlines += usize::from(!*fresh);
            return;
        }
        *fresh = false;
        for _ in 0..std::mem::take(newlines) {
            out.reasoning("\n");
        }
        out.reasoning(text_of(c, &mut [0; 4]));
    }

    /// An answer that ends within its thoughts is all thought.
    pub fn finish(&mut self, answer: &mut ToolReader, out: &mut Sink) {
        if matches!(self.stage, Stage::Before { .. }) {
            self.begin_without_mark(answer, out);
        }
        if matches!(self.stage, Stage::Inside { .. }) {
            for c in self.end.take().chars() {
                self.thought(c, out);
            }
            if let Stage::Inside { newlines, .. } = &mut self.stage {
                for _ in 0..std::mem::take(newlines) {
                    out.reasoning("\n");
                }
            }
        }
    }
}
