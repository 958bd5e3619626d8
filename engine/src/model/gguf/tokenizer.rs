//! From `tokenizer.ggml.*` to the `tokenizer.json` that does the same.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::reader::{Head, Value};

/// Kinds of tokens, as llama.cpp numbers them.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// What separates words in SentencePiece's tokens.
const SPACE: &str = "\u{2581}";

/// Text of a special token that metadata name by its id.
pub(super) fn special(head: &Head, key: &str) -> Option<String> {
    let Some(Value::Unsigned(id)) = head.metadata.get(&format!("tokenizer.ggml.{key}")) else { return None };
    let Some(Value::Texts(tokens)) = head.metadata.get("tokenizer.ggml.tokens") else { return None };
    tokens.get(usize::try_from(*id).ok()?).cloned()
}

/// The `tokenizer.json`.
///
/// # Errors
/// What is missing or not supported, in words.
pub(super) fn tokenizer(head: &Head) -> Result<Json, String> {
    let get = |key: &str| head.metadata.get(&format!("tokenizer.ggml.{key}"));
    let Some(Value::Texts(tokens)) = get("tokens") else {
        return Err("metadata \"tokenizer.ggml.tokens\" is missing, or no list of texts".into());
    };
    let kinds = match get("token_type") {
        Some(Value::Integers(kinds)) if kinds.len() == tokens.len() => kinds.clone(),
        None => vec![1; tokens.len()],
        Some(_) => {
            return Err("metadata \"tokenizer.ggml.token_type\" is no list as long as the tokens".into());
        }
    };
    let flag = |key: &str| match get(key) {
        Some(Value::Bool(flag)) => Some(*flag),
        _ => None,
    };
    let mut vocab = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        // Of tokens with one text the first counts, as there.
        vocab.entry(token.clone()).or_insert_with(|| id.into());
    }
    let added: Vec<Json> = (tokens.iter().zip(&kinds).enumerate())
        .filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
        .map(|(id, (token, kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": *kind != USER_DEFINED,
            })
        })
        .collect();
    let mut file = match get("model") {
        Some(Value::Text(model)) if model == "gpt2" => byte_level(head, vocab, flag("ignore_merges"))?,
        Some(Value::Text(model)) if model == "llama" => {
            let scores = match get("scores") {
                Some(Value::Floats(scores)) if scores.len() == tokens.len() => scores,
                _ => return Err("metadata \"tokenizer.ggml.scores\" is no list as long as the tokens".into()),
            };
            sentencepiece(tokens, scores, &kinds, vocab, flag("add_space_prefix").unwrap_or(true))
        }
        Some(Value::Text(model)) => {
            return Err(format!(
                "metadata \"tokenizer.ggml.model\" is {model:?}; supported: gpt2, llama. Take the safetensors checkpoint, which has \
                 its tokenizer beside it"
            ));
        }
        _ => return Err("metadata \"tokenizer.ggml.model\" is missing".into()),
    };
    let is_llama3 = matches!(get("pre"), Some(Value::Text(pre)) if LLAMA3.contains(&pre.as_str()));
    let is_llama = matches!(get("model"), Some(Value::Text(model)) if model == "llama");
    let starts = flag("add_bos_token").unwrap_or(is_llama || is_llama3);
    let bos = match get("bos_token_id") {
        Some(Value::Unsigned(id)) if starts => special(head, "bos_token_id").map(|text| (*id, text)),
        _ => None,
    };
    if let Some(map) = file.as_object_mut() {
        map.insert("version".into(), "1.0".into());
        map.insert("added_tokens".into(), added.into());
        map.insert("post_processor".into(), bos.map_or(Json::Null, |(id, text)| start_with(id, &text)));
    }
    Ok(file)
}

/// Puts a token before every text.
fn start_with(id: u64, text: &str) -> Json {
    let token = json!({ "SpecialToken": { "id": text, "type_id": 0 } });
    let of = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
    json!({
        "type": "TemplateProcessing",
        "single": [token, of("A")],
        "pair": [token, of("A"), token, of("B")],
        "special_tokens": { (text): { "id": text, "ids": [id], "tokens": [text] } },
    })
}

/// Names of Llama 3's way to cut text.
const LLAMA3: [&str; 4] = ["llama-bpe", "llama3", "llama-v3", "smaug-bpe"];

/// How text is cut before its pieces are merged, by the name that llama.cpp gave it.
fn cuts(pre: &str) -> Option<Json> {
    let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let split = |regex: String| {
        json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false },
            bytes(false),
        ] })
    };
    // The expressions of the models' own tokenizer.json, which differ in how many digits stand together.
    let words = |digits: &str| {
        split(format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ))
    };
    Some(match pre {
        "gpt-2" | "phi-2" | "gpt2" => bytes(true),
        "qwen2" | "deepseek-r1-qwen" => words(r"\p{N}"),
        pre if LLAMA3.contains(&pre) => words(r"\p{N}{1,3}"),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
            json!({ "type": "Sequence", "pretokenizers": [{ "type": "Digits", "individual_digits": true }, bytes(true)] })
        }
        _ => return None,
    })
}

/// Byte-level BPE, as of GPT-2.
fn byte_level(head: &Head, vocab: Map<String, Json>, ignore_merges: Option<bool>) -> Result<Json, String> {
    let Some(Value::Texts(merges)) = head.metadata.get("tokenizer.ggml.merges") else {
        return Err("metadata \"tokenizer.ggml.merges\" is missing, or no list of texts".into());
    };
    let pre = match head.metadata.get("tokenizer.ggml.pre") {
        Some(Value::Text(pre)) => pre.as_str(),
        _ => "gpt-2",
    };
    let Some(cuts) = cuts(pre) else {
        return Err(format!(
            "metadata \"tokenizer.ggml.pre\" is {pre:?}; supported: gpt-2, llama-bpe, qwen2, smollm and the like. Take the safetensors \
             checkpoint, which has its tokenizer beside it"
        ));
    };
    let is_qwen = pre.contains("qwen");
    Ok(json!({
        "normalizer": if is_qwen { json!({ "type": "NFC" }) } else { Json::Null },
        "pre_tokenizer": cuts,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": ignore_merges.unwrap_or(LLAMA3.contains(&pre)),
            "vocab": vocab, "merges": merges,
        },
    }))
}

/// SentencePiece's BPE: what merges first is what has the larger score.
fn sentencepiece(
    tokens: &[String],
    scores: &[f32],
    kinds: &[i64],
    vocab: Map<String, Json>,
    prefix: bool,
) -> Json {
    let unknown = kinds.iter().position(|kind| *kind == UNKNOWN).map(|id| &tokens[id]);
    let merges = merges(tokens, scores, kinds);
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let prepend = json!({ "type": "Prepend", "prepend": SPACE });
    let normalizers = if prefix { vec![prepend, replace] } else { vec![replace] };
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json!({
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    })
}

/// Every way to make a token out of two others, best first. Those of one token stand in the order of their parts' ids.
fn merges(tokens: &[String], scores: &[f32], kinds: &[i64]) -> Vec<[String; 2]> {
    let is_text = |id: usize| kinds[id] == 1 || kinds[id] == USER_DEFINED;
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut all: Vec<(f32, usize, usize, usize)> = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| is_text(*id)) {
        // Longer ones are no words of any model, and would cost their square.
        if token.len() > 512 {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            if let (Some(&left), Some(&right)) = (ids.get(&token[..at]), ids.get(&token[at..])) {
                all.push((scores[id], id, left, right));
            }
        }
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    all.into_iter().map(|(_, _, left, right)| [tokens[left].clone(), tokens[right].clone()]).collect()
}
