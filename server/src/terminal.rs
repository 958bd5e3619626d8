//! Writing for people: colours only where they are wanted, control characters never, and a closed pipe is no accident.

use std::{
    borrow::Cow,
    io::{self, IsTerminal, Write},
};

use crate::exit::Failure;

/// Prints an error as one line on stderr.
pub fn complain(failure: &Failure) {
    // Nobody to tell when stderr is closed.
    drop(writeln!(io::stderr(), "{failure}"));
}

/// How stdout wants its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// Stdout is a terminal.
    pub terminal: bool,
    /// With colours.
    pub color: bool,
}

impl Style {
    /// For this process's stdout; `color` is whether the user allows colours.
    pub fn of_stdout(color: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        Self { terminal, color: terminal && color }
    }

    /// In bold.
    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    /// In faint letters.
    pub fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    /// In one of six colours.
    pub fn hue(self, index: usize, text: &str) -> String {
        self.paint(["36", "33", "35", "32", "34", "31"][index % 6], text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A model's text for a terminal: control characters, which could move the cursor or change its colours, become U+FFFD. Line
/// breaks and tabs stay.
pub fn printable(text: &str) -> Cow<'_, str> {
    let harmless = |c: char| !c.is_control() || c == '\n' || c == '\t';
    if text.chars().all(harmless) {
        return text.into();
    }
    text.chars().map(|c| if harmless(c) { c } else { '\u{FFFD}' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_of_a_model_do_not_reach_the_terminal() {
        assert_eq!(printable("plain\n\tté"), "plain\n\tté");
        assert_eq!(printable("a\x1b[2Jb\u{9b}c\r"), "a\u{FFFD}[2Jb\u{FFFD}c\u{FFFD}");
    }
}
