//! What stands around a model that embeds or scores: how texts become prompts, and what follows pooling.

use std::collections::BTreeMap;

use crate::pooling::{Head, Scorer};

/// Everything around the model itself. The default is a model that embeds its last state.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Heads {
    /// What follows pooling in an embedding.
    pub embed: Head,
    /// What follows pooling in a score; absent: pairs are not scored.
    pub scorer: Option<Scorer>,
    /// What texts go through before.
    pub texts: TextRules,
}

/// What texts go through before they are embedded or scored; the names are those of sentence-transformers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextRules {
    /// What is put before a text, by name: `query`, `document` and the like.
    pub prompts: BTreeMap<String, String>,
    /// The name of the one that is put before texts whose request names none.
    pub default_prompt_name: Option<String>,
    /// Tokens of a text at most, with special tokens.
    pub max_seq_length: Option<usize>,
    /// Texts are lower-cased first.
    pub do_lower_case: bool,
    /// Segments that the model tells apart; 0 where it knows none.
    pub num_segments: usize,
}
