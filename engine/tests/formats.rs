//! Quantised checkpoints and GGUF files as hostile input, and what their texts become.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill_engine::{
    error::LoadError,
    model::{
        checkpoint::{Checkpoint, Tensors},
        files::{ModelFiles, ModelSource},
        spec::ModelSpec,
    },
    text::TextModel,
};
use tidemill_kernels::tensor::HostMatrix;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A folder with a quantised matrix `x`, from tensors `(name, dtype, shape, bytes each)` whose bytes are zeros.
fn folder(config: &Value, tensors: &[(&str, &str, &[usize])]) -> TempDir {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("config.json"), json!({ "quantization_config": config }).to_string())
        .unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape) in tensors {
        let size = match *dtype {
            "I32" | "F32" => 4,
            "F16" | "BF16" => 2,
            _ => 1,
        };
        let start = data.len();
        data.resize(start + size * shape.iter().product::<usize>(), 0_u8);
        header.insert(
            format!("x.{name}"),
            json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, data.len()] }),
        );
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    dir
}

fn matrix(dir: &Path, shape: [usize; 2]) -> Result<HostMatrix, LoadError> {
    Checkpoint::open(&ModelFiles::open(&ModelSource::Dir(dir.to_path_buf()))?)?.matrix("x", shape)
}

type Stored = [(&'static str, &'static str, &'static [usize])];

const AWQ: &Stored = &[("qweight", "I32", &[64, 2]), ("qzeros", "I32", &[2, 2]), ("scales", "F16", &[2, 16])];
const GPTQ: &Stored = &[
    ("qweight", "I32", &[8, 16]),
    ("qzeros", "I32", &[2, 2]),
    ("scales", "F16", &[2, 16]),
    ("g_idx", "I32", &[64]),
];
const FP8: &Stored = &[("weight", "F8_E4M3", &[16, 64]), ("weight_scale_inv", "F32", &[1, 2])];
const PACKED: &Stored = &[("weight_packed", "I32", &[16, 8]), ("weight_scale", "BF16", &[16, 2])];

fn awq() -> Value {
    json!({ "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": true, "version": "gemm" })
}

fn gptq() -> Value {
    json!({ "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": false, "sym": true })
}

fn fp8() -> Value {
    json!({ "quant_method": "fp8", "weight_block_size": [16, 32] })
}

fn packed(weights: Value) -> Value {
    json!({ "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": { "group_0": { "weights": weights } } })
}

fn int4() -> Value {
    packed(json!({ "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": true }))
}

#[test]
fn sound_tensors_make_matrices() {
    // Groups of 32 of 64 inputs: `g_idx` of zeros says that all are in the first, so this one is left out.
    for (config, stored) in [(awq(), AWQ), (gptq(), &GPTQ[..3]), (fp8(), FP8), (int4(), PACKED)] {
        let made = matrix(folder(&config, stored).path(), [16, 64]);
        assert!(matches!(made, Ok(HostMatrix::Quantized(_))), "{config}: {made:?}");
    }
}

/// The file and what is said of it.
#[track_caller]
fn refused(result: Result<HostMatrix, LoadError>, words: &[&str]) {
    let message = result.expect_err("this must be refused").to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} does not name {word:?}");
    }
}

fn with(mut config: Value, field: &str, value: Value) -> Value {
    config[field] = value;
    config
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let of = |config: &Value, stored: &Stored| matrix(folder(config, stored).path(), [16, 64]);
    for (config, stored) in [(awq(), AWQ), (gptq(), &GPTQ[..3]), (fp8(), FP8), (int4(), PACKED)] {
        for missing in 0..stored.len() {
            let rest: Vec<_> =
                stored.iter().enumerate().filter(|(i, _)| *i != missing).map(|(_, t)| *t).collect();
            refused(matrix(folder(&config, &rest).path(), [16, 64]), &["x."]);
            for (shape, dtype) in [
                (&[3_usize, 5][..], stored[missing].1),
                (&[0], stored[missing].1),
                (stored[missing].2, "I64"),
            ] {
                let mut changed = stored.to_vec();
                changed[missing] = (stored[missing].0, dtype, shape);
                if dtype == "I64" {
                    // Eight bytes each in the header, one in the file: refused with the file.
                    refused(matrix(folder(&config, &changed).path(), [16, 64]), &["model.safetensors"]);
                } else {
                    refused(matrix(folder(&config, &changed).path(), [16, 64]), &["x."]);
                }
            }
        }
        for shape in [[0, 64], [16, 0], [17, 64], [16, 63], [8, 128]] {
            assert!(matrix(folder(&config, stored).path(), shape).is_err(), "{config} {shape:?}");
        }
    }
    refused(of(&gptq(), GPTQ), &["x.g_idx", "desc_act"]);
    refused(of(&int4(), &[PACKED[0], PACKED[1], ("weight_g_idx", "I32", &[64])]), &["x.weight_g_idx"]);
    refused(of(&int4(), &[PACKED[0], ("weight_scale", "BF16", &[16, 0])]), &["x.weight_scale"]);
    refused(of(&json!({ "quant_method": "fp8" }), FP8), &["x.weight_scale_inv"]);
}

#[test]
fn variants_that_are_not_ours_are_refused_by_field() {
    let of = |config: Value| matrix(folder(&config, &[]).path(), [16, 64]);
    refused(of(json!({ "load_in_4bit": true })), &["quant_method", "bitsandbytes", "--quantization"]);
    for method in ["bitsandbytes", "hqq", "aqlm", "quanto", "torchao", "modelopt", ""] {
        refused(of(json!({ "quant_method": method })), &["quant_method", method, "--quantization"]);
    }
    refused(of(with(awq(), "version", json!("gemv"))), &["version"]);
    refused(of(with(awq(), "bits", json!(3))), &["bits"]);
    refused(of(with(gptq(), "bits", json!(3))), &["bits"]);
    refused(of(with(gptq(), "checkpoint_format", json!("marlin"))), &["checkpoint_format"]);
    for group in [json!(0), json!(24), json!(-2), json!("32"), json!(1e30), json!([])] {
        refused(of(with(awq(), "group_size", group.clone())), &["group_size"]);
        refused(of(with(gptq(), "group_size", group)), &["group_size"]);
    }
    for block in [json!([0, 32]), json!([128]), json!([128, 100]), json!("x"), json!([-1, 32])] {
        refused(of(with(fp8(), "weight_block_size", block)), &["weight_block_size"]);
    }
    refused(of(with(int4(), "format", json!("marlin-24"))), &["format"]);
    refused(of(packed(json!({ "num_bits": 2, "type": "int" }))), &["num_bits"]);
    refused(of(packed(json!({ "num_bits": 4, "type": "float" }))), &["num_bits"]);
    refused(of(json!({ "quant_method": "compressed-tensors", "config_groups": {} })), &["config_groups"]);
}

/// Everything that is read of a GGUF file before its weights are used.
fn read(path: &Path) -> Result<(), LoadError> {
    let files = ModelFiles::open(&ModelSource::Dir(path.to_path_buf()))?;
    let spec = ModelSpec::load(&files)?;
    let checkpoint = Checkpoint::open(&files)?;
    checkpoint.verify(&spec)?;
    TextModel::load(&files, &spec).map(drop)
}

fn read_bytes(bytes: &[u8]) -> Result<(), LoadError> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    read(&path)
}

#[test]
fn a_gguf_file_and_its_folder_are_read() {
    for name in ["gguf/llama", "gguf/qwen2"] {
        read(&fixture(name)).unwrap();
        read(&fixture(name).join("model.gguf")).unwrap();
    }
}

#[test]
fn cut_gguf_files_are_refused() {
    let whole = std::fs::read(fixture("gguf/qwen2/model.gguf")).unwrap();
    // Every byte of the first, then some.
    for length in (0..64).chain((64..whole.len()).step_by(whole.len() / 150)).chain([whole.len() - 1]) {
        let message = read_bytes(&whole[..length]).expect_err("a part of a file").to_string();
        assert!(message.contains("model.gguf"), "{length}: {message}");
    }
}

#[test]
fn flipped_bits_never_panic() {
    let whole = std::fs::read(fixture("gguf/qwen2/model.gguf")).unwrap();
    for i in 0..200_usize {
        let mut changed = whole.clone();
        // The head has some 12,000 bytes; its first are the counts.
        let at = if i < 24 { i } else { i * 7919 % 12_000 };
        changed[at] ^= 1 << (i % 8);
        let _ = read_bytes(&changed);
    }
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

/// A file with one metadata value of this type and these bytes.
fn one_value(kind: u32, value: &[u8]) -> Vec<u8> {
    let counts = [0_u64, 1].map(u64::to_le_bytes).concat();
    [b"GGUF".as_slice(), &3_u32.to_le_bytes(), &counts, &text("key"), &kind.to_le_bytes(), value].concat()
}

#[test]
fn counts_beyond_the_file_are_refused_before_memory_is_reserved() {
    let says = |bytes: &[u8], word: &str| {
        let message = read_bytes(bytes).expect_err("hostile").to_string();
        assert!(
            message.contains(word) && message.contains("model.gguf"),
            "{message:?} does not say {word:?}"
        );
    };
    let long = |n: u64| n.to_le_bytes();
    let head = |tensors: u64, values: u64| {
        [b"GGUF".as_slice(), &3_u32.to_le_bytes(), &long(tensors), &long(values)].concat()
    };
    says(&head(u64::MAX, 0), "tensors");
    says(&head(0, u64::MAX), "metadata values");
    says(&head(1 << 60, 1 << 60), "metadata values");
    says(&one_value(8, &long(1 << 63)), "bytes of text");
    says(&one_value(8, &long(u64::MAX)), "bytes of text");
    let list = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &long(count)].concat();
    says(&one_value(9, &list(8, u64::MAX)), "list items");
    says(&one_value(9, &list(4, 1 << 62)), "list items");
    let mut bomb = Vec::new();
    for _ in 0..100_000 {
        bomb.extend(list(9, 1));
    }
    says(&one_value(9, &bomb), "list of lists");
    says(&one_value(13, &[]), "type 13");
    says(&one_value(0, &[1]), "general.architecture");
    says(b"GGUF\x01\0\0\0", "version 1");
    says(b"GGUF\0\0\0\x03", "big-endian");
    says(b"GGML\0\0\0\x03", "GGUF");
}

#[test]
fn several_gguf_files_in_a_folder_are_no_choice_of_ours() {
    let dir = TempDir::new().unwrap();
    for name in ["a.gguf", "b.gguf"] {
        std::fs::write(dir.path().join(name), b"GGUF").unwrap();
    }
    assert!(read(dir.path()).unwrap_err().to_string().contains("several"));
}

/// Ids from transformers' reading of the same files: `scripts/make_gguf_goldens.py --verify` prints them.
#[test]
fn texts_of_a_gguf_tokenizer_have_the_ids_of_transformers() {
    let cases: &[(&str, &str, &[u32])] = &[
        ("gguf/llama", "the whether in then", &[1, 265, 270, 260, 259, 263, 274, 262, 265, 280]),
        (
            "gguf/llama",
            "  two  spaces\nand a line",
            // The prefix is put before spaces too, as llama.cpp does it.
            &[
                1, 274, 274, 261, 290, 278, 274, 274, 281, 292, 277, 287, 275, 281, 13, 266, 284, 268, 274,
                285, 262, 275,
            ],
        ),
        (
            "gguf/llama",
            "bytes: \u{e9}\u{4e16} 1234 it's",
            &[
                1, 274, 294, 291, 276, 275, 281, 61, 274, 198, 172, 231, 187, 153, 274, 52, 53, 54, 55, 274,
                279, 276, 42, 281,
            ],
        ),
        ("gguf/llama", "", &[1]),
        ("gguf/qwen2", "the whether in then", &[257, 263, 104, 101, 257, 114, 32, 259, 258, 110]),
        (
            "gguf/qwen2",
            "bytes: \u{e9}\u{4e16} 1234 it's",
            &[
                98, 121, 116, 101, 115, 58, 32, 195, 169, 228, 184, 150, 32, 49, 50, 51, 52, 32, 105, 116,
                39, 115,
            ],
        ),
        ("gguf/qwen2", "", &[]),
    ];
    for &(name, words, expected) in cases {
        let files = ModelFiles::open(&ModelSource::Dir(fixture(name))).unwrap();
        let text = TextModel::load(&files, &ModelSpec::load(&files).unwrap()).unwrap();
        let ids = text.encode(words, true).unwrap();
        assert_eq!(ids.iter().map(|id| id.0).collect::<Vec<_>>(), expected, "{name}: {words:?}");
        assert_eq!(text.decode(&ids, false).unwrap(), words, "{name}");
    }
}
