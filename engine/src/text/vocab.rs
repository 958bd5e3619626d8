//! What each token contributes to the text: a table made once from the tokenizer's decoder.
//!
//! Every decoder that is supported maps a token to bytes without looking at its neighbours; only the start of the text is
//! special. So decoding is a table look-up, and streaming it is exact by construction. A decoder for which this does not
//! hold is refused when the model is loaded.

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::{Tokenizer, decoders::wordpiece};

/// How bytes that are not UTF-8 are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Invalid {
    /// One U+FFFD for each maximal invalid sequence, as `String::from_utf8_lossy` (byte-level decoders).
    PerSequence,
    /// One U+FFFD for each byte (byte-fallback decoders).
    PerByte,
}

/// The tokenizer's decoder, reduced to what matters.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Pipeline {
    kind: Kind,
    /// Text replacements in each token, in order.
    replace: Vec<(String, String)>,
    byte_fallback: bool,
    /// Up to so many of this character are removed at the start of the text.
    pub(super) strip_start: Option<(char, usize)>,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    /// Tokens are text.
    Plain,
    /// Tokens are bytes in GPT-2's printable alphabet.
    ByteLevel,
    /// In the first token the marker is removed, in all others it is a space.
    Metaspace { marker: char, strip_first: bool },
    /// No decoder: tokens are words with a space between.
    Words,
    /// Words with a space between, but for tokens that continue one; with `cleanup`, spaces that English does not write are removed.
    WordPiece { prefix: String, cleanup: bool },
}

impl Pipeline {
    /// Reads the `decoder` of a `tokenizer.json`. The error says what is not supported.
    pub(super) fn new(decoder: Option<&Value>) -> Result<Self, String> {
        let mut pipeline =
            Self { kind: Kind::Plain, replace: Vec::new(), byte_fallback: false, strip_start: None };
        let Some(decoder) = decoder else {
            pipeline.kind = Kind::Words;
            return Ok(pipeline);
        };
        let steps = match decoder.get("decoders").and_then(Value::as_array) {
            Some(steps) if type_of(decoder) == "Sequence" => steps.iter().collect(),
            _ => vec![decoder],
        };
        let mut fused = false;
        for step in &steps {
            let kind = type_of(step);
            let supported = match kind {
                "ByteLevel" | "Metaspace" | "WordPiece" if steps.len() == 1 => pipeline.set_kind(kind, step),
                "Replace" if !fused && !pipeline.byte_fallback => pipeline.add_replacement(step),
                "ByteFallback" if !fused && !pipeline.byte_fallback => {
                    pipeline.byte_fallback = true;
                    true
                }
                "Fuse" => {
                    fused = true;
                    true
                }
                "Strip" if fused && pipeline.strip_start.is_none() => pipeline.set_strip(step),
                _ => false,
            };
            if !supported {
                return Err(format!(
                    "decoder step {kind:?} is not supported here; supported: ByteLevel, Metaspace, WordPiece, or a sequence of \
                     Replace (of a plain string), ByteFallback, Fuse and Strip (at the start)"
                ));
            }
        }
        Ok(pipeline)
    }

    fn set_kind(&mut self, kind: &str, step: &Value) -> bool {
        if kind == "ByteLevel" {
            self.kind = Kind::ByteLevel;
            return true;
        }
        if kind == "WordPiece" {
            let prefix = step.get("prefix").and_then(Value::as_str);
            let cleanup = step.get("cleanup").and_then(Value::as_bool);
            let (Some(prefix), Some(cleanup)) = (prefix, cleanup) else { return false };
            self.kind = Kind::WordPiece { prefix: prefix.to_owned(), cleanup };
            return true;
        }
        let Some(marker) = one_char(step.get("replacement")) else { return false };
        // "always" where absent.
        let strip_first = step.get("prepend_scheme").and_then(Value::as_str) != Some("never");
        self.kind = Kind::Metaspace { marker, strip_first };
        true
    }

    fn add_replacement(&mut self, step: &Value) -> bool {
        let pattern = step.get("pattern").and_then(|pattern| pattern.get("String")).and_then(Value::as_str);
        let content = step.get("content").and_then(Value::as_str);
        let (Some(pattern), Some(content)) = (pattern, content) else { return false };
        self.replace.push((pattern.to_owned(), content.to_owned()));
        !pattern.is_empty()
    }

    fn set_strip(&mut self, step: &Value) -> bool {
        let count = |field: &str| step.get(field).and_then(Value::as_u64);
        let (Some(content), Some(start), Some(0)) =
            (one_char(step.get("content")), count("start"), count("stop"))
        else {
            return false;
        };
        self.strip_start = Some((content, usize::try_from(start).unwrap_or(usize::MAX)));
        true
    }

    pub(super) fn invalid(&self) -> Invalid {
        if self.byte_fallback { Invalid::PerByte } else { Invalid::PerSequence }
    }

    /// The bytes of a token that is not the first.
    fn bytes(&self, token: &str) -> Vec<u8> {
        match &self.kind {
            Kind::ByteLevel => byte_level(token),
            Kind::Metaspace { marker, .. } => token.replace(*marker, " ").into_bytes(),
            Kind::Words => format!(" {token}").into_bytes(),
            Kind::WordPiece { prefix, cleanup } => {
                let text = match token.strip_prefix(prefix.as_str()) {
                    Some(rest) => rest.to_owned(),
                    None => format!(" {token}"),
                };
                cleaned(text, *cleanup)
            }
            Kind::Plain => {
                let replace = |text: String, (from, to): &(String, String)| text.replace(from.as_str(), to);
                let text = self.replace.iter().fold(token.to_owned(), replace);
                match byte_token(&text) {
                    Some(byte) if self.byte_fallback => vec![byte],
                    _ => text.into_bytes(),
                }
            }
        }
    }

    /// The bytes of a token that starts the text, where they differ.
    fn first_bytes(&self, token: &str) -> Option<Vec<u8>> {
        match &self.kind {
            Kind::Metaspace { marker, strip_first: true } if token.contains(*marker) => {
                Some(token.replace(*marker, "").into_bytes())
            }
            Kind::Words => Some(token.as_bytes().to_vec()),
            Kind::WordPiece { cleanup, .. } => Some(cleaned(token.to_owned(), *cleanup)),
            _ => None,
        }
    }
}

/// A token without the spaces that English does not write, as the `tokenizers` crate takes them out of each token by itself.
fn cleaned(token: String, cleanup: bool) -> Vec<u8> {
    if cleanup { wordpiece::cleanup(&token).into_bytes() } else { token.into_bytes() }
}

fn type_of(decoder: &Value) -> &str {
    decoder.get("type").and_then(Value::as_str).unwrap_or("without a type")
}

fn one_char(value: Option<&Value>) -> Option<char> {
    let mut chars = value?.as_str()?.chars();
    let first = chars.next()?;
    chars.next().is_none().then_some(first)
}

/// `<0x0A>` is byte 10, read as the `tokenizers` crate reads it.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 && digits.is_char_boundary(1) { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// A token in GPT-2's alphabet as bytes; a token with a character outside of it stands for itself.
fn byte_level(token: &str) -> Vec<u8> {
    token.chars().map(char_byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// `bytes_to_unicode` of GPT-2: printable Latin-1 stands for itself, the other 68 bytes follow from U+0100 on.
fn char_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The alphabet: each byte and its character.
pub(super) fn byte_level_alphabet() -> impl Iterator<Item = (u8, char)> {
    (0..=0x143).filter_map(char::from_u32).filter_map(|c| Some((char_byte(c)?, c)))
}

/// What an id of the model's vocabulary is to the tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// Nothing: the embedding table is larger than the vocabulary. Such an id leaves no trace in a text.
    Absent,
    /// Part of the text.
    Text,
    /// Part of the text only where special tokens are asked for.
    Special,
}

/// Bytes of every token, in one allocation.
#[derive(Debug)]
pub(super) struct TokenTable {
    ends: Vec<u32>,
    bytes: Vec<u8>,
    /// Tokens that read differently at the start of the text.
    first: HashMap<u32, Box<[u8]>>,
    kinds: Vec<TokenKind>,
    pub(super) invalid: Invalid,
    pub(super) strip_start: Option<(char, usize)>,
}

impl TokenTable {
    /// Decodes every id below `vocab_size`. Ids without a token are empty.
    pub(super) fn new(tokenizer: &Tokenizer, pipeline: &Pipeline, vocab_size: usize) -> Result<Self, String> {
        let mut table = Self {
            ends: Vec::with_capacity(vocab_size),
            bytes: Vec::new(),
            first: HashMap::new(),
            kinds: vec![TokenKind::Absent; vocab_size],
            invalid: pipeline.invalid(),
            strip_start: pipeline.strip_start,
        };
        let added = tokenizer.get_added_vocabulary();
        for id in 0..u32::try_from(vocab_size).map_err(|_| "vocab_size is over 2^32")? {
            if let Some(token) = tokenizer.id_to_token(id) {
                table.bytes.extend(pipeline.bytes(&token));
                if let Some(first) = pipeline.first_bytes(&token) {
                    table.first.insert(id, first.into());
                }
                let special = added.is_special_token(&token);
                table.kinds[id as usize] = if special { TokenKind::Special } else { TokenKind::Text };
            }
            table.ends.push(u32::try_from(table.bytes.len()).map_err(|_| "the vocabulary has over 4 GiB")?);
        }
        Ok(table)
    }

    /// A table of ids that stand for no text.
    pub(super) fn without_text(vocab_size: usize) -> Self {
        Self {
            ends: vec![0; vocab_size],
            bytes: Vec::new(),
            first: HashMap::new(),
            kinds: vec![TokenKind::Absent; vocab_size],
            invalid: Invalid::PerSequence,
            strip_start: None,
        }
    }

    /// Number of ids.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of a token within the text; empty for an id outside of the vocabulary.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Bytes of a token that starts the text.
    pub(super) fn first_bytes(&self, id: u32) -> &[u8] {
        match self.first.get(&id) {
            Some(bytes) => bytes,
            None => self.bytes(id),
        }
    }

    /// What an id is; absent for one outside of the vocabulary.
    pub(super) fn kind(&self, id: u32) -> TokenKind {
        self.kinds.get(id as usize).copied().unwrap_or(TokenKind::Absent)
    }
}
