//! Several streams on one screen: a live line for each on a terminal, lines as they fill elsewhere.

use std::io::{self, Write};

use console::{Term, truncate_str};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::prompts::Prompt;
use crate::terminal::{Style, printable};

/// Where the streams are shown.
#[derive(Debug)]
pub struct Screen {
    style: Style,
    live: MultiProgress,
    streams: Vec<Shown>,
}

#[derive(Debug)]
struct Shown {
    label: String,
    text: String,
    /// Bytes of `text` that stand on finished lines; without a terminal only.
    printed: usize,
    line: ProgressBar,
}

/// Width of the labels' column.
const LABEL: usize = 9;
/// Widest column of text.
const TEXT: usize = 96;

impl Screen {
    /// A screen for these streams.
    pub fn new(style: Style, prompts: &[Prompt]) -> Self {
        let target = if style.terminal { ProgressDrawTarget::stdout() } else { ProgressDrawTarget::hidden() };
        let live = MultiProgress::with_draw_target(target);
        let streams = prompts.iter().enumerate().map(|(index, prompt)| {
            let label = style.hue(index, &format!("{:<LABEL$}", prompt.label));
            let line = live.add(ProgressBar::new_spinner());
            if let Ok(template) = ProgressStyle::with_template("  {prefix} {msg}") {
                line.set_style(template);
            }
            line.set_prefix(label.clone());
            Shown { label, text: String::new(), printed: 0, line }
        });
        Self { style, streams: streams.collect(), live }
    }

    /// New text of a stream.
    pub fn text(&mut self, index: usize, text: &str, tokens: usize) {
        let (style, width) = (self.style, text_width());
        let Some(stream) = self.streams.get_mut(index) else { return };
        stream.text.push_str(&printable(text).replace(['\n', '\t'], " "));
        if style.terminal {
            let counter = format!("{tokens:>4} tokens ");
            let room = width.saturating_sub(counter.len());
            stream.line.set_message(format!("{}{}", style.dim(&counter), tail(&stream.text, room)));
        } else {
            stream.print_full_lines(width);
        }
    }

    /// A stream has ended: its whole text stays on the screen.
    pub fn done(&mut self, index: usize, remark: &str) {
        let (style, width) = (self.style, text_width());
        let Some(stream) = self.streams.get_mut(index) else { return };
        if style.terminal {
            let mut lines = wrap(&stream.text, width);
            lines.push(style.dim(remark));
            stream.line.finish_and_clear();
            let label = stream.label.clone();
            for (number, line) in lines.iter().enumerate() {
                let label = if number == 0 { label.clone() } else { " ".repeat(LABEL) };
                self.say(&format!("  {label} {line}"));
            }
        } else {
            let rest = stream.text[stream.printed..].trim().to_owned();
            let line = format!("  {} {rest} [{remark}]", stream.label);
            self.say(&line);
        }
    }

    /// A line above the live ones.
    pub fn say(&self, line: &str) {
        if self.style.terminal {
            // Fails only when stdout does, which the final report will notice.
            drop(self.live.println(line));
        } else {
            drop(writeln!(io::stdout(), "{line}"));
        }
    }
}

impl Screen {
    /// The live lines make way for what follows.
    pub fn close(self) {
        // On a terminal the cursor stands behind the last line. Both fail only when stdout does.
        self.say("");
        drop(self.live.clear());
        if self.style.terminal {
            drop(writeln!(io::stdout()));
        }
    }
}

impl Shown {
    /// Prints what fills lines and keeps the rest.
    fn print_full_lines(&mut self, width: usize) {
        loop {
            let rest = &self.text[self.printed..];
            let lines = wrap(rest, width);
            let Some(line) = lines.first().filter(|_| lines.len() > 1) else { return };
            drop(writeln!(io::stdout(), "  {} {line}", self.label));
            let start = rest.len() - rest.trim_start().len();
            self.printed += start + line.len();
        }
    }
}

/// Columns for text.
fn text_width() -> usize {
    let columns = usize::from(Term::stdout().size().1);
    columns.saturating_sub(LABEL + 4).clamp(20, TEXT)
}

/// The end of a text, as wide as there is room.
fn tail(text: &str, room: usize) -> String {
    let chars: Vec<char> = text.chars().collect();
    let from = chars.len().saturating_sub(room.saturating_sub(1));
    let end: String = chars[from..].iter().collect();
    // Wide characters take two columns.
    truncate_str(&end, room, "").into_owned()
}

/// Lines of at most `width` characters, broken at spaces where there are any.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut line = String::new();
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() || lines.is_empty() {
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_all_words_and_their_width() {
        let text = "one two three four five";
        let lines = wrap(text, 9);
        assert_eq!(lines, ["one two", "three", "four five"]);
        assert_eq!(wrap("", 9), [""]);
        assert_eq!(tail("abcdef", 4), "def");
    }
}
