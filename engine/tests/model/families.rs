//! Every family's configuration, from the fixtures of the golden tests.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use tidemill_engine::{
    error::LoadError,
    model::{
        Checkpoint, ModelFiles, ModelSource, ModelSpec,
        spec::{Heads, TensorKind},
    },
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Folders of models that generate, by name.
fn folders() -> Vec<PathBuf> {
    let entries = fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().path());
    let generates = |path: &PathBuf| {
        let golden = fs::read_to_string(path.join("golden.json")).unwrap_or_default();
        golden.contains("greedy_ids") && path.join("config.json").is_file()
    };
    let mut folders: Vec<_> = entries.filter(generates).collect();
    folders.sort();
    assert!(folders.len() >= 34, "{folders:?}");
    folders
}

fn config(folder: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

fn read(map: &Map<String, Value>) -> Result<ModelSpec, LoadError> {
    ModelSpec::from_json(Path::new("config.json"), Value::Object(map.clone()).to_string().as_bytes())
}

fn named(name: &str, changes: Value) -> Result<ModelSpec, LoadError> {
    let mut map = config(&fixtures().join(name));
    map.extend(changes.as_object().unwrap().clone());
    read(&map)
}

#[test]
fn the_list_of_tensors_is_what_checkpoints_hold() {
    for folder in folders() {
        let files = ModelFiles::open(&ModelSource::Dir(folder.clone())).unwrap();
        let (spec, checkpoint) = (ModelSpec::load(&files).unwrap(), Checkpoint::open(&files).unwrap());
        checkpoint.verify(&spec).unwrap();
        let list = spec.tensors();
        let asked: u64 = list.iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
        assert_eq!(checkpoint.num_parameters(), asked, "{}: nothing is left over", folder.display());
        let is_matrix = |kind| kind == TensorKind::Matrix;
        assert!(list.iter().all(|t| !is_matrix(t.kind) || t.shape.len() == 2 && t.name.ends_with(".weight")));
    }
}

/// Every field of every family with every kind of value: never a panic, and what is accepted can be listed.
#[test]
fn any_value_in_any_field_of_any_family_is_read_or_refused() {
    let values = [
        json!(null),
        json!(true),
        json!(false),
        json!("x"),
        json!([]),
        json!({}),
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(1.5),
        json!(1e308),
        json!(1e-308),
        json!(u64::MAX),
        json!([0, 1]),
        json!(["sliding_attention"]),
        json!({"rope_type": "yarn", "factor": 1e308}),
        json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": []}),
        json!({"full_attention": {"rope_type": "linear"}}),
        json!(16_777_216),
    ];
    for folder in folders() {
        let base = config(&folder);
        for field in base.keys() {
            for value in &values {
                let mut map = base.clone();
                map.insert(field.clone(), value.clone());
                let Ok(spec) = read(&map) else { continue };
                let heads = spec.head_shape();
                assert!(heads.num_heads.is_multiple_of(heads.num_kv_heads), "{field} {value}");
                assert!(spec.ropes.iter().all(|rope| rope.attention_factor() > 0.0), "{field} {value}");
                if spec.layers.len() < 8 {
                    assert!(spec.tensors().len() > spec.layers.len(), "{field} {value}");
                }
            }
        }
    }
}

#[test]
fn a_class_that_is_not_supported_is_told_which_are() {
    let error = named("llama", json!({"architectures": ["BloomForCausalLM"]})).unwrap_err().to_string();
    for name in [
        "BloomForCausalLM",
        "LlamaForCausalLM",
        "DeepseekV3ForCausalLM",
        "GPT2LMHeadModel",
        "GptOssForCausalLM",
    ] {
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn what_a_family_cannot_compute_is_refused_by_name() {
    for (name, changes, field) in [
        ("gpt2", json!({"add_cross_attention": true}), "add_cross_attention"),
        ("falcon7b", json!({"num_ln_in_parallel_attn": 2}), "num_ln_in_parallel_attn"),
        ("falcon40b", json!({"parallel_attn": false}), "parallel_attn"),
        ("deepseek_v2", json!({"topk_method": "noaux_tc"}), "topk_method"),
        ("deepseek_v2", json!({"norm_topk_prob": true}), "norm_topk_prob"),
        ("deepseek_v3", json!({"scoring_func": "softmax"}), "scoring_func"),
        ("deepseek_v3", json!({"moe_layer_freq": 2}), "moe_layer_freq"),
        ("gemma3", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
        ("qwen2", json!({"layer_types": ["full_attention", "chunked_attention"]}), "layer_types"),
        ("phi3", json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "rope_scaling.rope_type"),
        ("olmo2", json!({"sliding_window": 8}), "sliding_window"),
        ("mixtral", json!({"n_shared_experts": 1}), "n_shared_experts"),
    ] {
        let error = named(name, changes.clone()).expect_err(name);
        assert!(matches!(error, LoadError::Unsupported { .. }), "{name} {changes}: {error}");
        assert!(error.to_string().contains(&format!("`{field}`")), "{name} {changes}: {error}");
    }
}

#[test]
fn contradictions_are_refused_by_name() {
    for (name, changes, field) in [
        ("mixtral", json!({"num_experts": 5}), "num_local_experts"),
        ("mixtral", json!({"num_experts_per_tok": 9}), "num_experts_per_tok"),
        ("smollm3", json!({"no_rope_layers": [1]}), "no_rope_layers"),
        ("gemma2", json!({"layer_types": ["full_attention"]}), "layer_types"),
        ("deepseek_v3", json!({"n_group": 3}), "n_group"),
        ("deepseek_v3", json!({"topk_group": 5}), "topk_group"),
        ("deepseek_v3", json!({"num_key_value_heads": 2}), "num_key_value_heads"),
        ("falcon40b", json!({"num_kv_heads": 3}), "num_kv_heads"),
        ("phi3_longrope", json!({"partial_rotary_factor": 0.5}), "rope_scaling.short_factor"),
        ("qwen2", json!({"layer_types": ["full_attention", "sliding_attention"]}), "layer_types"),
        ("mixtral", json!({"num_hidden_layers": 4096, "num_local_experts": 4096}), "num_hidden_layers"),
    ] {
        let error = named(name, changes.clone()).expect_err(name);
        assert!(matches!(error, LoadError::Format { .. }), "{name} {changes}: {error}");
        assert!(error.to_string().contains(&format!("`{field}`")), "{name} {changes}: {error}");
    }
}

/// The configuration of a Gemma 3 with images says little of its text model: its class's defaults hold.
#[test]
fn the_text_model_within_gemma_3_is_found() {
    let whole = json!({
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106],
        "vision_config": {"hidden_size": 1152}, "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    });
    let mut spec = read(whole.as_object().unwrap()).unwrap();
    let Heads::Grouped(heads) = spec.heads else { panic!("{:?}", spec.heads) };
    assert_eq!((heads.num_heads, heads.num_kv_heads, heads.head_dim), (8, 4, 256));
    assert_eq!((spec.vocab_size, spec.max_position_embeddings, spec.eos.len()), (262_208, 131_072, 2));
    let windows: Vec<_> = spec.layers.iter().take(6).map(|layer| layer.attention.window.is_some()).collect();
    assert_eq!(windows, [true, true, true, true, true, false]);
    assert!(spec.embedding_name().starts_with("model.language_model.embed_tokens"));
    spec.follow_names(|name| name == "language_model.model.embed_tokens.weight");
    assert_eq!(spec.embedding_name(), "language_model.model.embed_tokens.weight");
}

#[test]
fn names_follow_a_checkpoint_without_the_prefix_of_its_class() {
    for (name, bare) in [("gpt2", "wte.weight"), ("qwen3", "embed_tokens.weight")] {
        let mut spec = named(name, json!({})).unwrap();
        let own = spec.embedding_name();
        spec.follow_names(|tensor| tensor == own);
        assert_eq!(spec.embedding_name(), own);
        spec.follow_names(|tensor| tensor == bare);
        assert_eq!(spec.embedding_name(), bare);
        assert!(spec.tensors().iter().all(|tensor| !tensor.name.starts_with(own.split('.').next().unwrap())));
    }
}
