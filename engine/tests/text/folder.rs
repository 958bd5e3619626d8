//! Models for the tests: the built-in one, and folders with small tokenizers of other kinds.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill_engine::{
    error::LoadError,
    model::{ModelFiles, ModelSource, ModelSpec},
    text::TextModel,
};

pub const VOCAB_SIZE: usize = 400;

pub fn demo() -> TextModel {
    let files = ModelFiles::open(&ModelSource::Builtin).unwrap();
    TextModel::load(&files, &ModelSpec::load(&files).unwrap()).unwrap()
}

/// A folder with these files beside a config for [`VOCAB_SIZE`] tokens.
pub fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = TempDir::new().unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB_SIZE, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), b"").unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

pub fn load(dir: &Path) -> Result<TextModel, LoadError> {
    let files = ModelFiles::open(&ModelSource::Dir(dir.to_path_buf())).unwrap();
    TextModel::load(&files, &ModelSpec::load(&files).unwrap())
}

/// A model with this `tokenizer.json`.
pub fn with_tokenizer(tokenizer: &Value) -> Result<TextModel, LoadError> {
    load(folder(&[("tokenizer.json", tokenizer.to_string().as_bytes())]).path())
}

/// A tokenizer of the SentencePiece kind: `<s>`, byte tokens, and words that start with "▁".
pub fn sentencepiece(decoder: Value) -> Value {
    let mut vocab = serde_json::Map::new();
    for name in ["<unk>", "<s>", "</s>"] {
        vocab.insert(name.to_owned(), vocab.len().into());
    }
    for byte in 0..=255 {
        vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
    }
    let mut merges = Vec::new();
    for letter in "▁abcdehilnorstw .中é".chars() {
        vocab.insert(letter.to_string(), vocab.len().into());
    }
    for (left, right) in
        [("h", "e"), ("he", "l"), ("▁", "hel"), ("▁hel", "l"), ("▁hell", "o"), ("▁", "▁"), ("t", "o")]
    {
        merges.push(format!("{left} {right}"));
        vocab.insert(format!("{left}{right}"), vocab.len().into());
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": merges},
    })
}

/// The decoder of Llama 2's tokenizer.
pub fn byte_fallback_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

pub fn metaspace_decoder() -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true})
}
