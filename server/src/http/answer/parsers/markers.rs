//! Finds fixed markers in text that arrives one character at a time.

/// Looks for any of some markers and holds back no more than what may be the beginning of one.
#[derive(Debug)]
pub(super) struct Markers {
    all: Vec<String>,
    firsts: Vec<char>,
    held: String,
}

/// What one more character made certain: some characters belong to no marker, and then perhaps a marker ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Characters that belong to no marker, in order.
    pub free: String,
    /// Position of the marker that just ended, in the list given at the beginning.
    pub marker: Option<usize>,
}

impl Markers {
    /// Empty markers are left out of the search, but keep their position.
    pub fn new(all: Vec<String>) -> Self {
        let mut firsts: Vec<char> = all.iter().filter_map(|marker| marker.chars().next()).collect();
        firsts.sort_unstable();
        firsts.dedup();
        Self { all, firsts, held: String::new() }
    }

    /// Whether a character can be passed on without asking [`Self::step`].
    pub fn is_free(&self, c: char) -> bool {
        self.held.is_empty() && self.firsts.binary_search(&c).is_err()
    }

    /// Whether nothing is held back.
    pub fn is_idle(&self) -> bool {
        self.held.is_empty()
    }

    /// Takes one character. Costs at most the markers' length, squared, whatever came before.
    pub fn step(&mut self, c: char) -> Found {
        let mut found = Found::default();
        self.held.push(c);
        while !self.held.is_empty() {
            if let Some(marker) = self.all.iter().position(|marker| *marker == self.held) {
                self.held.clear();
                found.marker = Some(marker);
                break;
            }
            if self.all.iter().any(|marker| marker.starts_with(&self.held)) {
                break;
            }
            found.free.push(self.held.remove(0));
        }
        found
    }

    /// Gives back what is held, at the end of the text.
    pub fn take(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
