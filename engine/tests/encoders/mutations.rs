//! A field of `config.json` that is changed changes the result, or is refused.

use std::fs;

use serde_json::{Value, json};

use crate::rig::{MODELS, TOLERANCE, copy, difference, fixture, goldens, result, start};

type Change = fn(&Value) -> Value;

/// Fields and what they are changed to; a model that does not have the field is left alone. The list is that of `scripts/golden_encoders.py`, which shows
/// that transformers notices each.
const MUTATIONS: [(&str, Change); 24] = [
    ("hidden_act", |_| json!("relu")),
    ("hidden_activation", |_| json!("relu")),
    ("layer_norm_eps", |_| json!(0.1)),
    ("norm_eps", |_| json!(0.1)),
    ("rms_norm_eps", |_| json!(0.1)),
    ("num_hidden_layers", |v| json!(v.as_u64().unwrap() - 1)),
    ("num_attention_heads", |v| json!(v.as_u64().unwrap() / 2)),
    ("num_key_value_heads", |v| json!(v.as_u64().unwrap() / 2)),
    ("head_dim", |v| json!(v.as_u64().unwrap() / 2)),
    ("type_vocab_size", |v| json!(v.as_u64().unwrap() + 1)),
    ("local_attention", |v| json!(v.as_u64().unwrap() / 2)),
    ("global_attn_every_n_layers", |v| json!(v.as_u64().unwrap() + 1)),
    ("layer_types", |v| v.as_array().unwrap().iter().map(|_| json!("full_attention")).collect()),
    ("global_rope_theta", |v| json!(v.as_f64().unwrap() * 10.0)),
    ("local_rope_theta", |v| json!(v.as_f64().unwrap() * 10.0)),
    ("rope_parameters", hotter),
    ("norm_bias", |_| json!(false)),
    ("attention_bias", |_| json!(false)),
    ("mlp_bias", |_| json!(false)),
    ("classifier_bias", |_| json!(false)),
    ("classifier_pooling", |_| json!("cls")),
    ("classifier_activation", |_| json!("gelu")),
    ("sliding_window", |v| json!(v.as_u64().unwrap() * 2)),
    ("id2label", |_| json!({"0": "A", "1": "B"})),
];

fn hotter(ropes: &Value) -> Value {
    let hot = |(kind, rope): (&String, &Value)| {
        let mut rope = rope.clone();
        rope["rope_theta"] = json!(rope["rope_theta"].as_f64().unwrap() * 10.0);
        (kind.clone(), rope)
    };
    Value::Object(ropes.as_object().unwrap().iter().map(hot).collect())
}

/// Whether the changed folder gives what the fixture gave.
fn is_unnoticed(name: &str, config: &Value) -> bool {
    let dir = copy(&fixture(name));
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let Ok(engine) = start(dir.path(), 128) else { return false };
    let off = |golden| difference(&result(&engine.handle(), golden), &golden.expected);
    goldens(name).iter().map(off).fold(0.0, f32::max) <= TOLERANCE
}

#[test]
fn every_field_that_matters_is_noticed() {
    let mut unnoticed = Vec::new();
    let mut tried = 0;
    for name in MODELS {
        let text = fs::read_to_string(fixture(name).join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        assert!(is_unnoticed(name, &config), "{name} as it is");
        for (field, change) in MUTATIONS {
            let Some(value) = config.get(field) else { continue };
            let mut changed = config.clone();
            changed[field] = change(value);
            if changed[field] != *value {
                tried += 1;
                unnoticed.extend(is_unnoticed(name, &changed).then(|| format!("{name}: {field}")));
            }
        }
    }
    assert!(unnoticed.is_empty() && tried > 50, "of {tried}, unnoticed: {unnoticed:?}");
}

#[test]
fn positions_that_are_counted_otherwise_are_refused_or_give_something_else() {
    let text = fs::read_to_string(fixture("xlmr_rerank").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["pad_token_id"] = json!(0);
    assert!(!is_unnoticed("xlmr_rerank", &config));
    config["pad_token_id"] = json!(90);
    assert!(start_error(&config).contains("max_position_embeddings"));
    for (field, value) in [
        ("position_embedding_type", json!("relative_key")),
        ("is_decoder", json!(true)),
        ("max_position_embeddings", json!(81)),
    ] {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config[field] = value;
        let error = start_error(&config);
        assert!(error.contains(field) || error.contains("position_embeddings"), "{field}: {error}");
    }
}

fn start_error(config: &Value) -> String {
    let dir = copy(&fixture("xlmr_rerank"));
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    start(dir.path(), 128).map(drop).unwrap_err().to_string()
}
