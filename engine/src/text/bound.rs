//! A lower bound of the number of tokens in a text, so that a gigantic prompt is refused without encoding it.

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::text::{
    tokenizer::TokenizerFile,
    vocab::{byte_level_alphabet, byte_token},
};

/// The most bytes of a text that one token can stand for, or `None` where there is no such limit: a step that may delete
/// text (a normalizer, a splitter that removes separators, an added token that swallows white space, an unknown token that
/// stands for many characters).
pub(super) fn max_bytes_per_token(file: &TokenizerFile, tokenizer: &Tokenizer) -> Option<usize> {
    let keeps_text = file.normalizer.as_ref().is_none_or(normalizer_keeps)
        && file.pre_tokenizer.as_ref().is_none_or(pre_tokenizer_keeps)
        && !file.added_tokens.iter().any(|token| token.lstrip || token.rstrip);
    if !keeps_text || !knows_every_byte(file, tokenizer) {
        return None;
    }
    // In GPT-2's alphabet a byte is a character of one or two bytes; in a byte-fallback vocabulary a space is a marker of
    // three. Either way the token's own bytes are no fewer than those of the text it stands for.
    tokenizer.get_vocab(true).into_keys().map(|token| token.len()).max().filter(|&longest| longest > 0)
}

/// Whether any text becomes tokens that stand for all of it.
fn knows_every_byte(file: &TokenizerFile, tokenizer: &Tokenizer) -> bool {
    let model = &file.model;
    let plain = |affix: &Option<String>| affix.as_ref().is_none_or(String::is_empty);
    let is_bpe = model.kind.as_deref().is_none_or(|kind| kind == "BPE");
    if !is_bpe || !plain(&model.continuing_subword_prefix) || !plain(&model.end_of_word_suffix) {
        return false;
    }
    if file.pre_tokenizer.as_ref().is_some_and(has_byte_level) {
        return byte_level_alphabet()
            .all(|(_, c)| tokenizer.token_to_id(c.encode_utf8(&mut [0; 4])).is_some());
    }
    let is_byte_token = |byte: u8| {
        let name = format!("<0x{byte:02X}>");
        byte_token(&name) == Some(byte) && tokenizer.token_to_id(&name).is_some()
    };
    model.byte_fallback && (0..=u8::MAX).all(is_byte_token)
}

fn type_of(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn steps<'a>(step: &'a Value, field: &str) -> &'a [Value] {
    step.get(field).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Whether a normalizer never makes a text shorter.
fn normalizer_keeps(step: &Value) -> bool {
    match type_of(step) {
        "Prepend" => true,
        "Sequence" => steps(step, "normalizers").iter().all(normalizer_keeps),
        "Replace" => {
            let pattern =
                step.get("pattern").and_then(|pattern| pattern.get("String")).and_then(Value::as_str);
            let content = step.get("content").and_then(Value::as_str);
            matches!((pattern, content), (Some(pattern), Some(content)) if pattern.len() <= content.len())
        }
        _ => false,
    }
}

/// Whether a pre-tokenizer only splits and adds.
fn pre_tokenizer_keeps(step: &Value) -> bool {
    match type_of(step) {
        "ByteLevel" | "Metaspace" | "Digits" => true,
        "Split" => step.get("behavior").and_then(Value::as_str).is_some_and(|behavior| behavior != "Removed"),
        "Sequence" => steps(step, "pretokenizers").iter().all(pre_tokenizer_keeps),
        _ => false,
    }
}

fn has_byte_level(step: &Value) -> bool {
    type_of(step) == "ByteLevel" || steps(step, "pretokenizers").iter().any(has_byte_level)
}
