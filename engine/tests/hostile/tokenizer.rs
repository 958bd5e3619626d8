//! Tokenizers of all kinds, and what stands beside them.

use std::path::{Path, PathBuf};

use serde_json::json;
use tidemill_engine::model::ModelSpec;

use crate::rig::{Rig, flips, good, nested, truncations};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers").join(name)
}

/// The good model with another tokenizer, and a specification with a vocabulary large enough for any of them.
fn rig(source: &str) -> (Rig, ModelSpec) {
    let rig = Rig::new(&[good(), fixture(source)]);
    let mut config: serde_json::Value = serde_json::from_slice(&rig.read("config.json")).unwrap();
    config["vocab_size"] = 2048.into();
    let mut spec = ModelSpec::from_json(Path::new("config.json"), config.to_string().as_bytes()).unwrap();
    spec.vocab_size = 2048;
    let cases: serde_json::Value = serde_json::from_slice(&rig.read("cases.json")).unwrap();
    rig.write("config.json", json!({"model_type": cases["model_type"]}).to_string().as_bytes());
    (rig, spec)
}

#[test]
fn tokenizers_cut_short_or_with_a_bit_turned_are_refused_or_work() {
    for (source, file, bits) in [
        ("sp_bpe", "tokenizer.model", 200),
        ("sp_unigram", "tokenizer.model", 60),
        ("sp_xlmr", "sentencepiece.bpe.model", 100),
        ("tiktoken_llama3", "tokenizer.model", 100),
        ("bpe_gpt2", "vocab.json", 100),
        ("bpe_qwen2", "merges.txt", 60),
        ("bpe_qwen2", "tokenizer_config.json", 100),
        ("bpe_qwen2", "added_tokens.json", 60),
        ("bpe_qwen2", "special_tokens_map.json", 60),
    ] {
        let (rig, spec) = rig(source);
        let whole = rig.read(file);
        let cuts = if file == "tokenizer.model" { 200 } else { 60 };
        let check = |what: &str| rig.text(&spec, &(source, file, what));
        let refused = rig.refused(file, truncations(&whole, cuts), check);
        assert!(refused > 0, "{source}/{file}");
        rig.refused(file, flips(&whole, 0..whole.len(), bits), check);
    }
}

#[test]
fn a_tokenizer_json_cut_short_or_with_a_bit_turned_is_refused_or_works() {
    let (rig, spec) = rig("sp_bpe");
    rig.remove("tokenizer_config.json");
    let demo =
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/tokenizer.json")).unwrap();
    rig.write("tokenizer.json", &demo);
    let check = |what: &str| rig.text(&spec, &what);
    let refused = rig.refused("tokenizer.json", truncations(demo.trim_ascii_end(), 200), check);
    assert_eq!(refused, 200);
    rig.refused("tokenizer.json", flips(&demo, 0..demo.len(), 150), check);
    // Settings stand at the beginning and the end; the vocabulary between.
    rig.refused("tokenizer.json", flips(&demo, 0..2000.min(demo.len()), 150), check);
}

#[test]
fn garbage_is_refused_by_name() {
    let garbage = |seed: u8| -> Vec<u8> {
        (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed).collect()
    };
    let (sentencepiece, spec) = rig("sp_bpe");
    for seed in 0..=255 {
        sentencepiece.write("tokenizer.model", &garbage(seed));
        let error = sentencepiece.text(&spec, &seed).unwrap_err();
        assert!(error.contains("tokenizer.model"), "{error}");
    }
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("one byte", vec![0x0A]),
        ("a length past the end", vec![0x0A, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F]),
        ("empty pieces", [0x0A, 0x00].repeat(100_000)),
        ("nested groups", vec![0x0B; 100_000]),
        ("a rank and no token", b"IQ== 0\n".to_vec()),
        ("ranks out of order", b"IQ== 5\nIg== 4294967295\n".to_vec()),
        ("a rank over all bounds", b"IQ== 99999999999999999999\n".to_vec()),
    ] {
        sentencepiece.write("tokenizer.model", &bytes);
        let error = sentencepiece.text(&spec, &what).expect_err(what);
        assert!(error.contains("tokenizer.model"), "{what}: {error}");
    }
}

#[test]
fn json_beside_a_tokenizer_may_be_deep_or_absurd() {
    let (rig, spec) = rig("bpe_qwen2");
    let token = |value: &str| format!("{{\"added_tokens_decoder\": {{\"520\": {value}}}}}");
    let configs = [
        nested(1_000_000),
        format!("{{\"added_tokens_decoder\": {}}}", nested(1_000_000)),
        token(&nested(100_000)),
        token("{\"content\": 5}"),
        token("{\"content\": \"\"}"),
        token("null"),
        token("{\"content\": \"x\", \"special\": \"yes\"}"),
        token(&format!("{{\"content\": \"{}\"}}", "x".repeat(1 << 20))),
        "{\"added_tokens_decoder\": {\"-1\": {\"content\": \"x\"}}}".to_owned(),
        "{\"added_tokens_decoder\": {\"4294967296\": {\"content\": \"x\"}}}".to_owned(),
        "{\"added_tokens_decoder\": {\"4294967295\": {\"content\": \"x\"}}}".to_owned(),
        "{\"added_tokens_decoder\": {\"9223372036854775808\": {\"content\": \"x\"}}}".to_owned(),
        "{\"added_tokens_decoder\": {\"520\": {\"content\": \"x\"}, \"521\": {\"content\": \"x\"}}}"
            .to_owned(),
        "{\"tokenizer_class\": 5}".to_owned(),
        "{\"add_bos_token\": \"maybe\"}".to_owned(),
        "{\"tokenizer_class\": \"SomethingElse\"}".to_owned(),
    ];
    let whole = rig.read("tokenizer_config.json");
    for config in configs {
        rig.write("tokenizer_config.json", config.as_bytes());
        let shown: String = config.chars().take(100).collect();
        rig.text(&spec, &shown).expect_err(&shown);
    }
    rig.write("tokenizer_config.json", &whole);
    for name in ["vocab.json", "added_tokens.json", "special_tokens_map.json"] {
        let whole = rig.read(name);
        for text in [
            nested(1_000_000),
            "[]".to_owned(),
            "{\"a\": -1}".to_owned(),
            "{\"bos_token\": 5, \"a\": 4294967296}".to_owned(),
        ] {
            rig.write(name, text.as_bytes());
            // special_tokens_map.json may hold fields that nobody knows.
            let result = rig.text(&spec, &name);
            assert!(
                result.is_err() || name.starts_with("special"),
                "{name}: {}",
                &text[..text.len().min(50)]
            );
        }
        rig.write(name, &whole);
    }
    rig.text(&spec, &"as it was").unwrap();
}
