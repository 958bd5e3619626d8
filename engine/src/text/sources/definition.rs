//! A tokenizer as `tokenizer.json` writes it, made from other files.

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::added::AddedToken;

/// What `tokenizer.json` holds.
#[derive(Debug, Serialize)]
pub(super) struct Definition<'a> {
    pub version: &'static str,
    pub added_tokens: &'a [AddedToken],
    pub normalizer: Option<Value>,
    pub pre_tokenizer: Option<Value>,
    pub post_processor: Option<Value>,
    pub decoder: Value,
    pub model: Model<'a>,
}

/// The vocabulary and how texts become its entries.
#[derive(Debug, Serialize)]
#[serde(tag = "type")]
pub(super) enum Model<'a> {
    #[serde(rename = "BPE")]
    Bpe {
        vocab: Vocab<'a>,
        merges: Vec<(&'a str, &'a str)>,
        unk_token: Option<&'a str>,
        fuse_unk: bool,
        byte_fallback: bool,
        ignore_merges: bool,
    },
    Unigram {
        vocab: Vec<(&'a str, f64)>,
        unk_id: usize,
        byte_fallback: bool,
    },
}

/// Tokens and their ids.
#[derive(Debug)]
pub(super) struct Vocab<'a>(pub Vec<(&'a str, u32)>);

impl Serialize for Vocab<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

/// Special tokens around each text: those before it and those after it, with their ids.
pub(super) fn template(before: &[(&str, u32)], after: &[(&str, u32)]) -> Option<Value> {
    if before.is_empty() && after.is_empty() {
        return None;
    }
    let special = |list: &[(&str, u32)], type_id: u32| -> Vec<Value> {
        list.iter().map(|(token, _)| json!({"SpecialToken": {"id": token, "type_id": type_id}})).collect()
    };
    let around = |sequence: &str, type_id: u32| {
        let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
        [special(before, type_id), vec![text], special(after, type_id)].concat()
    };
    let tokens = before
        .iter()
        .chain(after)
        .map(|(token, id)| ((*token).to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})));
    let pair = [around("A", 0), around("B", 1)].concat();
    Some(json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": Value::Object(tokens.collect()),
    }))
}
