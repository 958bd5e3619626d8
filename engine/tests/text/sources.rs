//! Tokenizers made from other files than `tokenizer.json`, against the libraries that these files belong to.
//! `fixtures/tokenizers/make.py` makes the files and the ids.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;
use tempfile::TempDir;
use tidemill_engine::{
    error::LoadError,
    ids::TokenId,
    model::{ModelFiles, ModelSource, ModelSpec},
    text::{TextModel, TokenizerKind},
};

#[derive(Deserialize)]
struct Reference {
    vocab_size: usize,
    model_type: String,
    cases: Vec<Case>,
    #[serde(default)]
    special: Vec<Special>,
    bos: Option<u32>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

#[derive(Deserialize)]
struct Special {
    text: String,
    ids: Vec<u32>,
    with_special: Vec<u32>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers").join(name)
}

/// A model folder with the fixture's tokenizer.
fn folder(name: &str) -> (TempDir, Reference) {
    let reference: Reference =
        serde_json::from_slice(&std::fs::read(fixture(name).join("cases.json")).unwrap()).unwrap();
    let dir = TempDir::new().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "cases.json" {
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    let config = json!({"model_type": reference.model_type});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), b"").unwrap();
    (dir, reference)
}

/// Of the model only the size of its vocabulary counts.
fn load(dir: &Path, vocab_size: usize) -> Result<TextModel, LoadError> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": vocab_size, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    });
    let spec = ModelSpec::from_json(Path::new("config.json"), config.to_string().as_bytes()).unwrap();
    TextModel::load(&ModelFiles::open(&ModelSource::Dir(dir.to_path_buf())).unwrap(), &spec)
}

fn ids(model: &TextModel, text: &str) -> Vec<u32> {
    model.encode(text, false).unwrap().into_iter().map(|id| id.0).collect()
}

fn decoded(model: &TextModel, ids: &[u32]) -> (String, String) {
    let ids: Vec<TokenId> = ids.iter().copied().map(TokenId).collect();
    let mut stream = model.detokenizer(true);
    let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
    streamed.push_str(&stream.finish());
    (model.decode(&ids, true).unwrap(), streamed)
}

/// All cases that differ, so that one run shows them together.
fn compare(name: &str) -> (TextModel, Reference) {
    let (dir, reference) = folder(name);
    let model = load(dir.path(), reference.vocab_size).unwrap();
    let mut wrong = Vec::new();
    for case in &reference.cases {
        let ours = ids(&model, &case.text);
        if ours != case.ids {
            let show = |ids: &[u32]| -> Vec<String> {
                ids.iter()
                    .map(|&id| String::from_utf8_lossy(model.token_bytes(TokenId(id))).into_owned())
                    .collect()
            };
            wrong.push(format!(
                "{:?}\n  ours      {:?}\n  reference {:?}",
                case.text,
                show(&ours),
                show(&case.ids)
            ));
        }
        let (whole, streamed) = decoded(&model, &case.ids);
        // SentencePiece has a text for what it does not know; transformers and we show the special token.
        let expected = case.decoded.replace(" ⁇ ", "<unk>");
        if whole != expected {
            wrong
                .push(format!("ids of {:?}\n  are read as {whole:?}\n  reference   {expected:?}", case.text));
        }
        assert_eq!(whole, streamed, "{:?}", case.text);
    }
    assert!(
        wrong.is_empty(),
        "{name}: {} of {} cases differ\n{}",
        wrong.len(),
        reference.cases.len(),
        wrong.join("\n")
    );
    assert!(reference.cases.len() > 30);
    (model, reference)
}

#[test]
fn sentencepiece_bpe_is_as_the_library() {
    let (model, reference) = compare("sp_bpe");
    assert_eq!(model.tokenizer_kind(), Some(TokenizerKind::SentencePiece));
    for case in &reference.special {
        assert_eq!(ids(&model, &case.text), case.ids, "{:?}", case.text);
        let with: Vec<u32> = model.encode(&case.text, true).unwrap().iter().map(|id| id.0).collect();
        assert_eq!(with, case.with_special, "{:?}", case.text);
    }
    let special: Vec<String> = model.special_tokens().into_iter().map(|(_, token)| token).collect();
    assert_eq!(special, ["<unk>", "<s>", "</s>", "<ctl>"], "what the user defined is text");
}

#[test]
fn sentencepiece_unigram_is_as_the_library() {
    compare("sp_unigram");
    compare("sp_unigram_bytes");
    let (model, _) = compare("sp_xlmr");
    let with = model.encode("The tide", true).unwrap();
    assert_eq!((with[0], with[with.len() - 1]), (TokenId(0), TokenId(2)), "<s> and </s>");
}

#[test]
fn lists_of_ranks_are_as_tiktoken() {
    let (model, reference) = compare("tiktoken_llama3");
    assert_eq!(model.tokenizer_kind(), Some(TokenizerKind::Tiktoken));
    assert_eq!(model.encode("The", true).unwrap()[0].0, reference.bos.unwrap());
    assert_eq!(model.special_tokens().len(), 256);
    compare("tiktoken_o200k");
}

#[test]
fn vocab_and_merges_are_as_transformers() {
    let (model, _) = compare("bpe_gpt2");
    assert_eq!(model.tokenizer_kind(), Some(TokenizerKind::VocabAndMerges));
    compare("bpe_qwen2");
}
