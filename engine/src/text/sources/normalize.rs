//! SentencePiece's normaliser: what is done to a text before it is cut into pieces.
//!
//! The steps and their order are those of `Normalizer::Normalize` in the SentencePiece project (normalizer.cc): replacements by the
//! longest rule that matches, spaces at the ends and runs of them, the space before the text, spaces as "▁". Tokens that are always
//! tokens of their own stay as they are.

use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};

use super::{added::AddedToken, proto::NormalizerSpec};

/// How spaces are written within pieces.
pub(super) const SPACE: char = '▁';

/// Whether a space goes before the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prefix {
    /// It does not.
    Never,
    /// Before the text, unless that begins with a special token.
    First,
    /// After each special token too.
    Always,
}

/// A normaliser, ready for texts.
#[derive(Debug)]
pub(crate) struct Normalizer {
    charsmap: Option<Charsmap>,
    prefix: Prefix,
    /// Spaces at both ends go, and runs of them become one.
    trims: bool,
    space: char,
    finder: AhoCorasick,
    kept: Vec<AddedToken>,
}

impl Normalizer {
    /// The tokens of `kept` stay as they are. The error says what is wrong with the rules.
    pub(super) fn new(spec: &NormalizerSpec, prefix: Prefix, kept: Vec<AddedToken>) -> Result<Self, String> {
        let charsmap = if spec.charsmap.is_empty() { None } else { Some(Charsmap::parse(&spec.charsmap)?) };
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            // The other kinds take far more memory for long tokens, and little time is spent here.
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .build(kept.iter().map(|token| token.content.as_bytes()))
            .map_err(|error| format!("its special tokens cannot be searched for: {error}"))?;
        let space = if spec.escape_whitespaces { SPACE } else { ' ' };
        Ok(Self { charsmap, prefix, trims: spec.remove_extra_whitespaces, space, finder, kept })
    }

    /// Whether a text never gets shorter.
    pub(crate) fn keeps_text(&self) -> bool {
        self.charsmap.is_none() && !self.trims && !self.kept.iter().any(|token| token.lstrip || token.rstrip)
    }

    /// The text as it is to be cut.
    pub(crate) fn normalize(&self, text: &str) -> String {
        let mut output = Output {
            rules: self,
            text: String::with_capacity(text.len() + text.len() / 2),
            after_space: self.trims,
            wants_prefix: self.prefix != Prefix::Never,
        };
        let mut from = 0;
        for found in self.finder.find_iter(text) {
            let token = &self.kept[found.pattern()];
            // A token that takes the space before it may have taken it already.
            let Some(mut between) = text.get(from..found.start()) else { continue };
            if token.lstrip {
                between = between.trim_end();
            }
            output.segment(between);
            output.token(token);
            from = found.end();
            if token.rstrip {
                from = text.len() - text[from..].trim_start().len();
            }
        }
        output.segment(text.get(from..).unwrap_or_default());
        output.finish()
    }
}

struct Output<'a> {
    rules: &'a Normalizer,
    text: String,
    after_space: bool,
    wants_prefix: bool,
}

impl Output<'_> {
    fn prefix(&mut self) {
        if std::mem::take(&mut self.wants_prefix) {
            self.text.push(self.rules.space);
        }
    }

    fn token(&mut self, token: &AddedToken) {
        if !token.special {
            self.prefix();
        }
        self.text.push_str(&token.content);
        self.wants_prefix = token.special && self.rules.prefix == Prefix::Always;
        self.after_space = self.rules.trims && token.content.ends_with(' ');
    }

    fn segment(&mut self, mut rest: &str) {
        let rules = self.rules;
        while let Some(c) = rest.chars().next() {
            let rule = rules.charsmap.as_ref().and_then(|charsmap| charsmap.longest(rest));
            match rule {
                Some((length, replacement)) => {
                    self.push(replacement);
                    // Rules are made of whole characters; one that is not ends where the next character starts.
                    let end = (length..=rest.len()).find(|&end| rest.is_char_boundary(end));
                    rest = &rest[end.unwrap_or(rest.len())..];
                }
                None => {
                    self.push(&rest[..c.len_utf8()]);
                    rest = &rest[c.len_utf8()..];
                }
            }
        }
    }

    fn push(&mut self, chunk: &str) {
        let chunk = if self.after_space { chunk.trim_start_matches(' ') } else { chunk };
        if chunk.is_empty() {
            return;
        }
        self.prefix();
        for c in chunk.chars() {
            self.text.push(if c == ' ' { self.rules.space } else { c });
        }
        self.after_space = self.rules.trims && chunk.ends_with(' ');
    }

    fn finish(mut self) -> String {
        if self.rules.trims {
            self.text.truncate(self.text.trim_end_matches(self.rules.space).len());
        }
        self.text
    }
}

/// Replacements: a double-array trie (darts-clone's layout) from texts to places in a list of texts that end with a zero.
#[derive(Debug)]
struct Charsmap {
    trie: Vec<u32>,
    texts: String,
}

impl Charsmap {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let wrong = || "normalizer_spec.precompiled_charsmap is cut short or broken".to_owned();
        let (size, rest) = bytes.split_first_chunk::<4>().ok_or_else(wrong)?;
        let size = usize::try_from(u32::from_le_bytes(*size)).map_err(|_| wrong())?;
        let (trie, texts) = rest.split_at_checked(size).ok_or_else(wrong)?;
        let (units, []) = trie.as_chunks::<4>() else { return Err(wrong()) };
        let texts = std::str::from_utf8(texts).map_err(|_| wrong())?.to_owned();
        Ok(Self { trie: units.iter().map(|unit| u32::from_le_bytes(*unit)).collect(), texts })
    }

    fn unit(&self, node: u32) -> Option<u32> {
        self.trie.get(usize::try_from(node).ok()?).copied()
    }

    /// The longest rule for the text's beginning: its length in bytes and what it gives. A broken trie has no rules.
    fn longest(&self, text: &str) -> Option<(usize, &str)> {
        let offset = |unit: u32| (unit >> 10) << ((unit & (1 << 9)) >> 6);
        let mut node = offset(self.unit(0)?);
        let mut longest = None;
        for (at, byte) in text.bytes().enumerate() {
            node ^= u32::from(byte);
            let Some(unit) = self.unit(node) else { break };
            if unit & ((1 << 31) | 0xFF) != u32::from(byte) {
                break;
            }
            node ^= offset(unit);
            if unit >> 8 & 1 == 1 {
                longest = self.unit(node).map(|leaf| (at + 1, leaf & !(1 << 31))).or(longest);
            }
        }
        let (length, start) = longest?;
        let text = self.texts.get(usize::try_from(start).ok()?..)?;
        Some((length, text.split('\0').next().unwrap_or_default()))
    }
}
