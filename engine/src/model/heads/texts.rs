//! What texts go through before they are embedded or scored, as sentence-transformers keeps it beside a model.

use std::collections::BTreeMap;

use super::{Fields, ModelFiles, ModelSpec, parse_object};
use crate::{error::LoadError, heads::TextRules};

/// Prompts; optional.
const PROMPTS: &str = "config_sentence_transformers.json";
/// How the module Transformer reads texts; optional.
const TRANSFORMER: &str = "sentence_bert_config.json";
/// Longest prompt by name in bytes.
const MAX_PROMPT_BYTES: usize = 16 << 10;

/// Reads the rules of a folder.
///
/// # Errors
/// [`LoadError::Format`] for what is malformed, naming the file and the field.
pub(super) fn read(files: &ModelFiles, spec: &ModelSpec) -> Result<TextRules, LoadError> {
    let mut rules = TextRules { num_segments: spec.num_segments(), ..TextRules::default() };
    if let Some(bytes) = files.read(PROMPTS)? {
        let path = files.path(PROMPTS);
        let map = parse_object(&path, &bytes)?;
        let fields = Fields::new(&path, &map);
        if let Some(prompts) = fields.object("prompts")? {
            rules.prompts = named(&prompts)?;
        }
        rules.default_prompt_name = fields.string("default_prompt_name")?.map(str::to_owned);
        if let Some(name) =
            rules.default_prompt_name.as_ref().filter(|name| !rules.prompts.contains_key(*name))
        {
            return Err(
                fields.bad("default_prompt_name", format!("is {name:?}, which `prompts` does not have"))
            );
        }
    }
    if let Some(bytes) = files.read(TRANSFORMER)? {
        let path = files.path(TRANSFORMER);
        let map = parse_object(&path, &bytes)?;
        let fields = Fields::new(&path, &map);
        rules.max_seq_length = fields.count("max_seq_length", usize::MAX)?;
        rules.do_lower_case = fields.boolean("do_lower_case")?.unwrap_or(false);
    }
    Ok(rules)
}

fn named(prompts: &Fields<'_>) -> Result<BTreeMap<String, String>, LoadError> {
    let mut all = BTreeMap::new();
    for name in prompts.names() {
        let prompt = prompts.string(name)?.unwrap_or("");
        if prompt.len() > MAX_PROMPT_BYTES {
            return Err(
                prompts.bad(name, format!("has {} bytes; at most {MAX_PROMPT_BYTES} are read", prompt.len()))
            );
        }
        all.insert(name.to_owned(), prompt.to_owned());
    }
    Ok(all)
}
