//! What a folder says of its embeddings, and what it may not say.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill_engine::{
    EmbeddingInfo, Pooling,
    error::LoadError,
    model::{ModelFiles, ModelSource, ModelSpec, embedding_info},
};

/// A folder of the built-in model's size with these files besides.
fn read(extra: &[(&str, Value)]) -> Result<EmbeddingInfo, LoadError> {
    let builtin = ModelFiles::open(&ModelSource::Builtin).unwrap();
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("config.json"), builtin.require("config.json").unwrap()).unwrap();
    fs::write(dir.path().join("model.safetensors"), []).unwrap();
    for (name, content) in extra {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content.to_string()).unwrap();
    }
    let files = ModelFiles::open(&ModelSource::Dir(dir.path().to_owned())).unwrap();
    embedding_info(&files, &ModelSpec::load(&files).unwrap())
}

fn modules(kinds: &[(&str, &str)]) -> Value {
    let module = |(kind, path): &(&str, &str)| json!({"idx": 0, "name": "0", "path": path, "type": format!("sentence_transformers.models.{kind}")});
    kinds.iter().map(module).collect()
}

fn plain_modules() -> Value {
    modules(&[("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")])
}

fn with_pooling(config: Value) -> Result<EmbeddingInfo, LoadError> {
    read(&[("modules.json", plain_modules()), ("1_Pooling/config.json", config)])
}

#[track_caller]
fn is_unsupported(result: Result<EmbeddingInfo, LoadError>, named: &[&str]) {
    let error = result.unwrap_err();
    assert!(matches!(error, LoadError::Unsupported { .. }), "{error:?}");
    let text = error.to_string();
    assert!(named.iter().all(|name| text.contains(name)), "{text}");
}

#[track_caller]
fn is_malformed(result: Result<EmbeddingInfo, LoadError>, named: &[&str]) {
    let error = result.unwrap_err();
    assert!(matches!(error, LoadError::Format { .. }), "{error:?}");
    let text = error.to_string();
    assert!(named.iter().all(|name| text.contains(name)), "{text}");
}

#[test]
fn a_plain_decoder_gives_the_last_state_at_length_one() {
    let info = read(&[]).unwrap();
    assert_eq!((info.pooling, info.normalize), (Pooling::Last, true));
    let builtin = ModelFiles::open(&ModelSource::Builtin).unwrap();
    assert_eq!(info.dimensions, ModelSpec::load(&builtin).unwrap().hidden_size);
}

#[test]
fn all_poolings_are_read_in_both_dialects() {
    for (old, new, pooling) in [
        ("pooling_mode_lasttoken", "lasttoken", Pooling::Last),
        ("pooling_mode_mean_tokens", "mean", Pooling::Mean),
        ("pooling_mode_cls_token", "cls", Pooling::Cls),
        ("pooling_mode_max_tokens", "max", Pooling::Max),
        ("pooling_mode_weightedmean_tokens", "weightedmean", Pooling::WeightedMean),
        ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", Pooling::MeanSqrtLen),
    ] {
        let mut config = json!({
            "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": false, "pooling_mode_max_tokens": false,
            "pooling_mode_mean_sqrt_len_tokens": false, "include_prompt": true,
        });
        config[old] = true.into();
        assert_eq!(with_pooling(config).unwrap().pooling, pooling);
        assert_eq!(with_pooling(json!({"pooling_mode": new})).unwrap().pooling, pooling);
    }
}

#[test]
fn whether_to_normalise_is_a_module() {
    let pooling = ("pooling/config.json", json!({"pooling_mode": "mean"}));
    for (kinds, normalize) in [
        (&[("Transformer", ""), ("Pooling", "pooling")][..], false),
        (&[("Transformer", "."), ("Pooling", "pooling"), ("Normalize", "")], true),
    ] {
        let info = read(&[("modules.json", modules(kinds)), pooling.clone()]).unwrap();
        assert_eq!(info.normalize, normalize);
    }
    // Newer class names have more parts.
    let mut list = modules(&[("Transformer", ""), ("Pooling", "pooling")]);
    list[1]["type"] = "sentence_transformers.base.modules.pooling.Pooling".into();
    assert!(read(&[("modules.json", list), pooling]).is_ok());
}

#[test]
fn what_is_not_supported_is_named_with_what_is() {
    let supported = "supported are Transformer, then Pooling (cls, mean, lasttoken, max, weightedmean or mean_sqrt_len_tokens)";
    is_unsupported(
        with_pooling(json!({"pooling_mode": "last_two"})),
        &["pooling_mode", "\"last_two\"", supported],
    );
    let two = json!({"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true});
    is_unsupported(with_pooling(two), &["second pooling", supported]);
    let leaves_out = json!({"pooling_mode": "mean", "include_prompt": false});
    is_unsupported(with_pooling(leaves_out), &["include_prompt"]);
    let pooling = ("1_Pooling/config.json", json!({"pooling_mode": "mean"}));
    let lstm = modules(&[("Transformer", ""), ("Pooling", "1_Pooling"), ("LSTM", "2_LSTM")]);
    is_unsupported(
        read(&[("modules.json", lstm), pooling.clone()]),
        &["Transformer, Pooling, LSTM", supported],
    );
    let dense = modules(&[("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]);
    let config = json!({"in_features": 256, "out_features": 7, "activation_function": "torch.nn.modules.activation.PReLU"});
    let files = [("modules.json", dense), pooling, ("2_Dense/config.json", config)];
    is_unsupported(read(&files), &["activation_function", "PReLU", "Tanh"]);
    let nested = modules(&[("Transformer", "0_Transformer"), ("Pooling", "1_Pooling")]);
    is_unsupported(read(&[("modules.json", nested)]), &["folder of its own"]);
    is_unsupported(read(&[("modules.json", json!([]))]), &["modules.json", supported]);
}

#[test]
fn hostile_and_broken_files_are_errors_that_name_them() {
    is_malformed(read(&[("modules.json", json!({"a": 1}))]), &["modules.json", "list of objects"]);
    is_malformed(read(&[("modules.json", json!([1]))]), &["modules.json", "list of objects"]);
    is_malformed(read(&[("modules.json", json!([{"path": ""}]))]), &["`type` is missing"]);
    is_malformed(read(&[("modules.json", plain_modules())]), &["config.json", "missing"]);
    for path in ["../other", "/etc", "a/../../b", "./x/.."] {
        let list = modules(&[("Transformer", ""), ("Pooling", path)]);
        is_malformed(read(&[("modules.json", list)]), &["not inside the model folder"]);
    }
    is_malformed(with_pooling(json!({})), &["pooling_mode", "missing"]);
    is_malformed(with_pooling(json!({"pooling_mode": 3})), &["pooling_mode", "string"]);
    is_malformed(with_pooling(json!({"pooling_mode_mean_tokens": "yes"})), &["true or false"]);
    let width = json!({"pooling_mode": "mean", "word_embedding_dimension": 7});
    is_malformed(with_pooling(width), &["word_embedding_dimension", "hidden_size"]);
}
