//! From tiktoken's ranks, or from `vocab.json` and `merges.txt`, to a byte-level tokenizer.

use std::collections::HashMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::json;

use super::{
    added::{AddedToken, FolderTokens},
    definition::{Definition, Model, Vocab, template},
    families::Family,
    proto::{MAX_PIECE_BYTES, shown},
};
use crate::{error::LoadError, text::vocab::byte_level_alphabet};

/// Tokens in GPT-2's alphabet with their ids, and what is merged first.
#[derive(Debug)]
pub(super) struct Merged {
    vocab: Vec<(String, u32)>,
    merges: Vec<(String, String)>,
    /// Made from ranks: a text that is a token as a whole needs no merges.
    is_ranked: bool,
}

/// Builds the tokenizer, as `tokenizer.json`.
pub(super) fn convert(
    merged: &Merged,
    folder: &FolderTokens,
    family: Family,
    fail: impl Fn(String) -> LoadError,
) -> Result<Vec<u8>, LoadError> {
    let ids: HashMap<&str, u32> = merged.vocab.iter().map(|(token, id)| (token.as_str(), *id)).collect();
    // The folder that Meta publishes holds the ranks alone.
    let is_plain_llama3 = merged.is_ranked && family == Family::Llama3 && !folder.has_ids();
    let base = if is_plain_llama3 { llama3_tokens(merged.vocab.len()) } else { Vec::new() };
    let mut added = folder.merge(base, |content| ids.get(content).copied())?;
    if merged.is_ranked {
        fill_gaps(&mut added, merged.vocab.len());
    }
    let id_of = |content: &str| {
        let added = || added.iter().find(|token| token.content == content).map(|token| token.id);
        ids.get(content).copied().or_else(added)
    };
    let around = |wanted: bool, roles: &[&str], known: Option<&'static str>| {
        let token = roles.iter().find_map(|role| folder.role(role)).or(known).filter(|_| wanted);
        let Some(token) = token else { return Ok(None) };
        let id = id_of(token).ok_or_else(|| {
            fail(format!("texts get the token {:?}, but the vocabulary has none", shown(token)))
        })?;
        Ok::<_, LoadError>(Some((token, id)))
    };
    let is_llama3 = merged.is_ranked && family == Family::Llama3;
    let (before, after) = match family {
        Family::Roberta => (
            around(true, &["cls_token", "bos_token"], Some("<s>"))?,
            around(true, &["sep_token", "eos_token"], Some("</s>"))?,
        ),
        _ => {
            let start = if is_llama3 { Some("<|begin_of_text|>") } else { None };
            let before = around(folder.add_bos.unwrap_or(is_llama3), &["bos_token"], start)?;
            (before, around(folder.add_eos.unwrap_or(false), &["eos_token"], None)?)
        }
    };
    let definition = Definition {
        version: "1.0",
        added_tokens: &added,
        normalizer: family.normalizer(),
        pre_tokenizer: Some(family.pre_tokenizer(folder.add_prefix_space.unwrap_or(false))),
        post_processor: template(before.as_slice(), after.as_slice()),
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        model: Model::Bpe {
            vocab: Vocab(merged.vocab.iter().map(|(token, id)| (token.as_str(), *id)).collect()),
            merges: merged.merges.iter().map(|(left, right)| (left.as_str(), right.as_str())).collect(),
            unk_token: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: merged.is_ranked,
        },
    };
    serde_json::to_vec(&definition).map_err(|error| fail(error.to_string()))
}

/// Special tokens of Llama 3, 3.1 and 3.2, in the order of their ids; the rest of 256 are reserved.
const LLAMA3_TOKENS: [&str; 11] = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
];

fn llama3_tokens(first: usize) -> Vec<AddedToken> {
    let reserved = (3..).map(|number| format!("<|reserved_special_token_{number}|>"));
    let names = LLAMA3_TOKENS.into_iter().map(str::to_owned).chain(reserved).take(256);
    let first = u32::try_from(first).unwrap_or(u32::MAX);
    names.zip(first..).map(|(name, id)| AddedToken::new(id, name, true)).collect()
}

/// Ids between the vocabulary and the last added token get names of their own: a tokenizer numbers without gaps.
fn fill_gaps(added: &mut Vec<AddedToken>, vocab: usize) {
    let mut next = u32::try_from(vocab).unwrap_or(u32::MAX);
    // A gap this large is a mistake, which the check of ids reports.
    const MAX_GAP: u32 = 4096;
    let mut filled = Vec::with_capacity(added.len());
    for token in added.drain(..) {
        while next < token.id && token.id - next <= MAX_GAP {
            filled.push(AddedToken::new(next, format!("<|reserved_token_{next}|>"), true));
            next += 1;
        }
        next = next.max(token.id.saturating_add(1));
        filled.push(token);
    }
    *added = filled;
}

/// Whether the bytes may be a list of ranks: the first line is base64, a space and a number.
pub(super) fn looks_like_ranks(bytes: &[u8]) -> bool {
    let line = bytes.split(|&byte| byte == b'\n').next().unwrap_or_default();
    line.len() <= 2 * MAX_PIECE_BYTES && rank(line).is_some()
}

fn rank(line: &[u8]) -> Option<(Vec<u8>, u32)> {
    let line = std::str::from_utf8(line).ok()?.trim_end_matches('\r');
    let (token, rank) = line.split_once(' ')?;
    Some((BASE64_STANDARD.decode(token).ok()?, rank.parse().ok()?))
}

/// Reads a tiktoken file: a line for each token, base64 and its rank, which is its id. The error says what is wrong.
///
/// Merges are the splits of each token into two others, in the order of its rank, as transformers makes them.
pub(super) fn ranks(bytes: &[u8]) -> Result<Merged, String> {
    let mut tokens = Vec::new();
    for (number, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let (token, rank) =
            rank(line).ok_or_else(|| format!("line {} is not a token in base64 and its rank", number + 1))?;
        if token.is_empty() || token.len() > MAX_PIECE_BYTES {
            return Err(format!(
                "line {}: a token has {} bytes; 1 to {MAX_PIECE_BYTES} are accepted",
                number + 1,
                token.len()
            ));
        }
        tokens.push((token, rank));
    }
    let ranks: HashMap<&[u8], u32> = tokens.iter().map(|(token, rank)| (token.as_slice(), *rank)).collect();
    if ranks.len() != tokens.len() {
        return Err("a token stands in it twice".to_owned());
    }
    if let Some(byte) = (0..=u8::MAX).find(|byte| !ranks.contains_key(&[*byte][..])) {
        return Err(format!("the byte 0x{byte:02X} has no token"));
    }
    // Ids may not leave gaps: added tokens come right after.
    let mut seen = vec![false; tokens.len()];
    for (_, rank) in &tokens {
        match seen.get_mut(*rank as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(format!("the rank {rank} is there twice, or leaves a gap below it")),
        }
    }
    let alphabet: Vec<char> = byte_alphabet();
    let text = |bytes: &[u8]| bytes.iter().map(|&byte| alphabet[usize::from(byte)]).collect::<String>();
    let mut merges = Vec::new();
    for (token, rank) in &tokens {
        let splits = (1..token.len()).map(|at| token.split_at(at));
        let ranked = splits
            .filter_map(|(left, right)| Some((*rank, *ranks.get(left)?, *ranks.get(right)?, left, right)));
        merges.extend(ranked);
    }
    merges.sort_unstable_by_key(|&(rank, left, right, ..)| (rank, left, right));
    Ok(Merged {
        vocab: tokens.iter().map(|(token, rank)| (text(token), *rank)).collect(),
        merges: merges.into_iter().map(|(.., left, right)| (text(left), text(right))).collect(),
        is_ranked: true,
    })
}

/// GPT-2's printable character of each byte.
fn byte_alphabet() -> Vec<char> {
    let mut alphabet = vec![char::REPLACEMENT_CHARACTER; 256];
    for (byte, c) in byte_level_alphabet() {
        alphabet[usize::from(byte)] = c;
    }
    alphabet
}

/// Reads `vocab.json`: tokens and their ids. The error says what is wrong.
pub(super) fn vocab(bytes: &[u8]) -> Result<HashMap<String, u32>, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("not an object of tokens and ids: {error}"))
}

/// Reads `merges.txt`: two tokens to a line, the most important first. The error says what is wrong.
pub(super) fn merges(text: &str, vocab: HashMap<String, u32>) -> Result<Merged, String> {
    let mut merges = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || (number == 0 && line.starts_with("#version")) {
            continue;
        }
        let (left, right) =
            line.split_once(' ').ok_or_else(|| format!("line {} is not two tokens", number + 1))?;
        for token in [left, right, &format!("{left}{right}")] {
            if !vocab.contains_key(token) {
                return Err(format!("line {}: {:?} is not in vocab.json", number + 1, shown(token)));
            }
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(Merged { vocab: vocab.into_iter().collect(), merges, is_ranked: false })
}
