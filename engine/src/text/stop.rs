//! Stop strings in a stream of text.

/// What one piece of text led to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that is certainly not part of a stop string. With a match: all text before it.
    pub emit: String,
    /// The stop string that ended the text.
    pub matched: Option<String>,
}

/// Finds stop strings in a stream, wherever the pieces are cut.
///
/// The stop string that is complete first ends the text; of several that end at the same place, the longest. This is what
/// a reader would find who watches the text grow letter by letter, so it does not depend on how the text is cut into
/// pieces, and never needs a token more than necessary. Text is held back only while it may become a stop string.
///
/// Each pattern runs its own Knuth–Morris–Pratt automaton: the work is linear in the text, whatever the patterns.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    held: String,
    done: bool,
}

#[derive(Debug, Clone)]
struct Pattern {
    text: String,
    /// For each prefix, the length of its longest proper prefix that is its suffix too.
    borders: Vec<usize>,
    /// Bytes of the pattern that the text ends with.
    matched: usize,
}

impl Pattern {
    fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut borders = vec![0; bytes.len()];
        let mut length = 0;
        for end in 1..bytes.len() {
            while length > 0 && bytes[end] != bytes[length] {
                length = borders[length - 1];
            }
            length += usize::from(bytes[end] == bytes[length]);
            borders[end] = length;
        }
        Self { text, borders, matched: 0 }
    }

    /// Takes the next byte; true where the pattern is complete.
    fn step(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.borders[self.matched - 1];
        }
        self.matched += usize::from(bytes[self.matched] == byte);
        self.matched == bytes.len()
    }
}

impl StopMatcher {
    /// A matcher at the start of a text. Empty stop strings never match.
    pub fn new(stops: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let stops = stops.into_iter().map(Into::into).filter(|stop| !stop.is_empty());
        Self { patterns: stops.map(Pattern::new).collect(), held: String::new(), done: false }
    }

    /// Takes the next piece. After a match all further text is dropped.
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.done {
            return StopStep::default();
        }
        let start = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            if let Some(matched) = self.step(byte) {
                // A whole pattern of whole characters: its start is a character boundary.
                self.held.truncate(start + i + 1 - matched.len());
                self.done = true;
                return StopStep { emit: std::mem::take(&mut self.held), matched: Some(matched) };
            }
        }
        // The text's last `matched` bytes are a pattern's first: they start where a character starts.
        let hold = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - hold);
        StopStep { emit: std::mem::replace(&mut self.held, kept), matched: None }
    }

    /// The longest pattern that is complete with this byte.
    fn step(&mut self, byte: u8) -> Option<String> {
        let mut longest: Option<&str> = None;
        for pattern in &mut self.patterns {
            if pattern.step(byte) && longest.is_none_or(|text| text.len() < pattern.text.len()) {
                longest = Some(&pattern.text);
            }
        }
        longest.map(str::to_owned)
    }

    /// The end of the text: what was held back and became no stop string.
    pub fn finish(&mut self) -> String {
        self.done = true;
        std::mem::take(&mut self.held)
    }
}
