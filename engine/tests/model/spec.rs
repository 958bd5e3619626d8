use std::path::Path;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tidemill_engine::{
    error::LoadError,
    ids::TokenId,
    model::{
        ModelSpec, RopeScaling, RopeSpec,
        spec::{DenseSpec, MlpSpec, Output},
    },
};
use tidemill_kernels::{
    ops::{Activation, HeadShape},
    tensor::DType,
};

fn base() -> Map<String, Value> {
    let Value::Object(map) = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": [2, 3], "tie_word_embeddings": true, "attention_bias": false,
        "mlp_bias": false, "dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.02, "use_cache": true, "pretraining_tp": 1, "transformers_version": "5.23.0",
    }) else {
        unreachable!()
    };
    map
}

fn read(map: &Map<String, Value>) -> Result<ModelSpec, LoadError> {
    ModelSpec::from_json(Path::new("config.json"), Value::Object(map.clone()).to_string().as_bytes())
}

/// The base with some fields replaced; `()` in the JSON sense (a missing field) is written as the string "absent".
fn with(changes: Value) -> Result<ModelSpec, LoadError> {
    let mut map = base();
    for (name, value) in changes.as_object().unwrap() {
        if value == "absent" {
            map.shift_remove(name);
        } else {
            map.insert(name.clone(), value.clone());
        }
    }
    read(&map)
}

#[test]
fn every_field_is_read() {
    let spec = read(&base()).unwrap();
    assert_eq!((spec.architecture, spec.vocab_size, spec.hidden_size), ("LlamaForCausalLM", 256, 64));
    assert_eq!((spec.layers.len(), spec.norm.eps, spec.max_position_embeddings), (2, 1e-5, 256));
    assert_eq!(spec.head_shape(), HeadShape { num_heads: 4, num_kv_heads: 2, head_dim: 32 });
    let MlpSpec::Dense(dense) = spec.layers[1].mlp else { panic!("{:?}", spec.layers[1].mlp) };
    assert_eq!(dense, DenseSpec { width: 96, activation: Activation::Silu, is_gated: true, bias: false });
    assert_eq!((spec.bos, spec.eos), (Some(TokenId(1)), vec![TokenId(2), TokenId(3)]));
    let attention = &spec.layers[0].attention;
    assert_eq!((spec.tie_word_embeddings, attention.qkv_bias, attention.output_bias), (true, false, false));
    let rope = RopeSpec { dim: 32, is_interleaved: false, theta: 10000.0, scaling: RopeScaling::Default };
    assert_eq!((&spec.ropes[..], attention.rope, spec.dtype), (&[rope][..], Some(0), Some(DType::Bf16)));
}

#[test]
fn absent_fields_take_the_defaults_of_transformers() {
    let spec =
        with(json!({"head_dim": "absent", "num_key_value_heads": null, "tie_word_embeddings": "absent",
        "attention_bias": "absent", "mlp_bias": "absent", "dtype": "absent", "rope_parameters": "absent",
        "hidden_act": "absent", "model_type": "absent", "bos_token_id": "absent", "eos_token_id": null}))
        .unwrap();
    assert_eq!(spec.head_shape(), HeadShape { num_heads: 4, num_kv_heads: 4, head_dim: 16 });
    assert_eq!((spec.ropes[0].theta, spec.tie_word_embeddings), (10000.0, false));
    assert_eq!((spec.dtype, spec.bos), (None, None));
    assert!(spec.eos.is_empty());
}

#[test]
fn both_dialects_say_the_same() {
    let kinds = [
        json!({"rope_type": "default"}),
        json!({"rope_type": "linear", "factor": 4.0}),
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}),
        json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 16}),
    ];
    for kind in kinds {
        let mut new = kind.clone();
        new["rope_theta"] = json!(500000.0);
        let new = with(json!({"rope_parameters": new, "dtype": "float16"})).unwrap();
        let old = with(json!({"rope_parameters": "absent", "rope_theta": 500000.0, "rope_scaling": kind,
            "dtype": "absent", "torch_dtype": "float16"}));
        assert_eq!(new, old.unwrap());
        let mut older = kind.clone();
        older["type"] = older.as_object_mut().unwrap().shift_remove("rope_type").unwrap();
        let older = with(json!({"rope_parameters": "absent", "rope_theta": 500000.0, "rope_scaling": older,
            "dtype": "float16", "torch_dtype": "float16"}));
        assert_eq!(new, older.unwrap());
        assert_eq!((new.ropes[0].theta, new.dtype), (500000.0, Some(DType::F16)));
    }
}

#[test]
fn yarn_follows_the_rules_of_transformers() {
    let rope = |rope: Value, top: Value| {
        let mut changes = json!({"rope_parameters": rope, "max_position_embeddings": 4096});
        changes.as_object_mut().unwrap().extend(top.as_object().unwrap().clone());
        match with(changes).unwrap().ropes[0].scaling {
            RopeScaling::Yarn {
                attention_factor,
                original_max_position_embeddings,
                truncate,
                beta_fast,
                ..
            } => (attention_factor, original_max_position_embeddings, truncate, beta_fast),
            ref other => panic!("{other:?}"),
        }
    };
    let yarn = |extra: Value| {
        let mut rope = json!({"rope_type": "yarn", "factor": 4.0});
        rope.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        rope
    };
    let inferred = 0.1 * 4f64.ln() + 1.0;
    // Without the original length: the whole context.
    assert_eq!(rope(yarn(json!({})), json!({})), (inferred, 4096, true, 32.0));
    let original = json!({"original_max_position_embeddings": 1024, "truncate": false, "beta_fast": 0});
    assert_eq!(rope(yarn(original.clone()), json!({})), (inferred, 1024, false, 32.0));
    // The top-level field wins.
    assert_eq!(rope(yarn(original), json!({"original_max_position_embeddings": 512})).1, 512);
    assert_eq!(
        rope(yarn(json!({"attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 1.0})), json!({})).0,
        1.5
    );
    let mscale = (0.1 * 2.0 * 4f64.ln() + 1.0) / inferred;
    assert_eq!(rope(yarn(json!({"mscale": 2.0, "mscale_all_dim": 1.0})), json!({})).0, mscale);
    assert_eq!(rope(yarn(json!({"mscale": 2.0, "mscale_all_dim": 0})), json!({})).0, inferred);
}

#[test]
fn a_window_of_mistral_is_what_the_field_says_and_4096_where_it_is_absent() {
    for (window, expected) in [(json!(null), None), (json!(8), Some(8)), (json!("absent"), Some(4096))] {
        let mistral = json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window});
        let spec = with(mistral).unwrap();
        assert!(spec.layers.iter().all(|layer| layer.attention.window == expected), "{window}");
    }
}

#[test]
fn a_model_without_an_output_layer_has_its_tensors_without_a_prefix() {
    for (name, model_type) in [("LlamaModel", "llama"), ("MistralModel", "mistral")] {
        let headless =
            with(json!({"architectures": [name], "model_type": model_type, "sliding_window": null})).unwrap();
        assert_eq!((headless.architecture, headless.output), (name, Output::Hidden));
        for tied in [true, false] {
            let names = |spec: &ModelSpec| {
                let spec = ModelSpec { tie_word_embeddings: tied, ..spec.clone() };
                spec.tensors().into_iter().map(|tensor| tensor.name).collect::<Vec<_>>()
            };
            let mut expected = names(&with(json!({})).unwrap());
            expected.retain(|name| name != "lm_head.weight");
            let stripped: Vec<_> = expected.iter().map(|name| name.strip_prefix("model.").unwrap()).collect();
            assert_eq!(names(&headless), stripped);
        }
    }
}

/// What is wrong, and what the message must say.
#[test]
fn what_we_cannot_compute_is_refused_by_name() {
    let unsupported = [
        (json!({"architectures": ["BloomForCausalLM"]}), ["BloomForCausalLM", "LlamaForCausalLM"]),
        (json!({"hidden_act": "quick_gelu"}), ["hidden_act", "silu"]),
        (json!({"sliding_window": 4096}), ["sliding_window", "LlamaForCausalLM has no such thing"]),
        (
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            ["layer_types", "LlamaForCausalLM"],
        ),
        (json!({"num_local_experts": 8}), ["num_local_experts", ""]),
        (json!({"num_experts": 8}), ["num_experts", ""]),
        (json!({"attention_multiplier": 0.5}), ["attention_multiplier", ""]),
        (json!({"partial_rotary_factor": 0.5}), ["partial_rotary_factor", "0.5"]),
        (
            json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
            ["rope_parameters.partial_rotary_factor", ""],
        ),
        (json!({"rope_parameters": {"rope_type": "proportional"}}), ["proportional", "llama3"]),
        (
            json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
            ["rope_parameters.full_attention", "all layers"],
        ),
        (
            json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": null}),
            ["dynamic", "yarn"],
        ),
        (json!({"dtype": "float8_e4m3fn"}), ["dtype", "bfloat16"]),
    ];
    for (changes, parts) in unsupported {
        let error = with(changes.clone()).expect_err(&changes.to_string());
        assert!(matches!(error, LoadError::Unsupported { .. }), "{changes}: {error}");
        let error = error.to_string();
        assert!(parts.iter().all(|part| error.contains(part)) && error.contains("config.json"), "{error}");
    }
}

#[test]
fn what_is_wrong_or_contradictory_is_refused_by_name() {
    let yarn = |extra: Value| {
        let mut rope = json!({"rope_type": "yarn", "factor": 4.0});
        rope.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!({"rope_parameters": rope})
    };
    let llama3 = |low: f64, high: f64| {
        json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": low,
            "high_freq_factor": high}})
    };
    let wrong = [
        (json!({"architectures": "absent"}), "architectures"),
        (json!({"architectures": []}), "architectures"),
        (json!({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}), "architectures"),
        (json!({"model_type": "qwen2"}), "model_type"),
        (json!({"vocab_size": 0}), "vocab_size"),
        (json!({"vocab_size": "256"}), "vocab_size"),
        (json!({"vocab_size": 256.5}), "vocab_size"),
        (json!({"vocab_size": -1}), "vocab_size"),
        (json!({"hidden_size": u64::MAX}), "hidden_size"),
        (json!({"vocab_size": 16_000_000, "hidden_size": 16_000_000, "head_dim": 32}), "hidden_size"),
        (json!({"intermediate_size": "absent"}), "intermediate_size"),
        (json!({"num_hidden_layers": 1_000_000}), "num_hidden_layers"),
        (json!({"num_attention_heads": null}), "num_attention_heads"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        (json!({"num_key_value_heads": 8}), "num_key_value_heads"),
        (json!({"head_dim": 0}), "head_dim"),
        (json!({"head_dim": 31}), "head_dim"),
        (json!({"head_dim": null, "hidden_size": 66}), "hidden_size"),
        (json!({"rms_norm_eps": 0}), "rms_norm_eps"),
        (json!({"rms_norm_eps": -1e-5}), "rms_norm_eps"),
        (json!({"rms_norm_eps": "1e-5"}), "rms_norm_eps"),
        (json!({"rms_norm_eps": "absent"}), "rms_norm_eps"),
        (json!({"max_position_embeddings": "absent"}), "max_position_embeddings"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings"),
        (json!({"attention_bias": 1}), "attention_bias"),
        (json!({"eos_token_id": 256}), "eos_token_id"),
        (json!({"eos_token_id": [1, "2"]}), "eos_token_id"),
        (json!({"bos_token_id": -1}), "bos_token_id"),
        (json!({"torch_dtype": "float16"}), "dtype"),
        (json!({"rope_theta": 500000.0}), "rope_parameters.rope_theta"),
        (json!({"rope_theta": 0, "rope_parameters": null}), "rope_theta"),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}), "rope_scaling"),
        (json!({"rope_scaling": [1]}), "rope_scaling"),
        (json!({"rope_parameters": {"rope_type": "linear"}}), "rope_parameters.factor"),
        (json!({"rope_parameters": {"rope_type": "linear", "factor": 0}}), "rope_parameters.factor"),
        (
            json!({"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2}}),
            "rope_parameters.rope_type",
        ),
        (json!({"rope_parameters": {"factor": 2.0}}), "rope_parameters.factor"),
        (json!({"rope_parameters": {"rope_type": 7}}), "rope_parameters.rope_type"),
        (llama3(4.0, 4.0), "rope_parameters.high_freq_factor"),
        (llama3(0.0, 4.0), "rope_parameters.low_freq_factor"),
        (
            json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}),
            "rope_parameters.low_freq_factor",
        ),
        (yarn(json!({"factor": null})), "rope_parameters.factor"),
        (yarn(json!({"beta_fast": 1, "beta_slow": 2})), "rope_parameters.beta_fast"),
        (yarn(json!({"rope_theta": 1.0})), "rope_parameters.rope_theta"),
        (yarn(json!({"attention_factor": -1})), "rope_parameters.attention_factor"),
        (yarn(json!({"truncate": 1})), "rope_parameters.truncate"),
        (
            yarn(json!({"original_max_position_embeddings": 0})),
            "rope_parameters.original_max_position_embeddings",
        ),
    ];
    for (changes, field) in wrong {
        let error = with(changes.clone()).expect_err(&changes.to_string());
        assert!(matches!(error, LoadError::Format { .. }), "{changes}: {error}");
        assert!(error.to_string().contains(&format!("`{field}`")), "{changes}: {error}");
    }
    for text in ["", "[]", "{", "{\"rms_norm_eps\": NaN}", "null", "\u{feff}{}"] {
        let error = ModelSpec::from_json(Path::new("config.json"), text.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
    }
}

#[test]
fn the_tensor_list_follows_the_specification() {
    let names = |changes: Value| {
        let list = with(changes).unwrap().tensors();
        list.into_iter().map(|tensor| (tensor.name, tensor.shape)).collect::<Vec<_>>()
    };
    let tied = names(json!({}));
    assert_eq!(tied.len(), 1 + 2 * 9 + 1);
    let shape = |name: &str| tied.iter().find(|tensor| tensor.0 == name).unwrap().1.clone();
    assert_eq!(shape("model.embed_tokens.weight"), [256, 64]);
    assert_eq!(shape("model.layers.0.self_attn.q_proj.weight"), [128, 64]);
    assert_eq!(shape("model.layers.1.self_attn.k_proj.weight"), [64, 64]);
    assert_eq!(shape("model.layers.1.self_attn.o_proj.weight"), [64, 128]);
    assert_eq!(shape("model.layers.1.mlp.down_proj.weight"), [64, 96]);
    assert_eq!(shape("model.norm.weight"), [64]);
    let all = names(json!({"tie_word_embeddings": false, "attention_bias": true, "mlp_bias": true}));
    assert_eq!(all.len(), 1 + 2 * (9 + 7) + 2);
    assert!(all.contains(&("model.layers.0.self_attn.q_proj.bias".to_owned(), vec![128])));
    assert!(all.contains(&("model.layers.0.mlp.down_proj.bias".to_owned(), vec![64])));
    assert_eq!(all.last().unwrap().0, "lm_head.weight");
}

/// Every field with every kind of value: never a panic, and what is accepted can be computed with.
#[test]
fn any_value_in_any_field_is_read_or_refused() {
    let values = [
        json!(null),
        json!(true),
        json!("x"),
        json!(""),
        json!([]),
        json!({}),
        json!(0),
        json!(-1),
        json!(1),
        json!(2),
        json!(1.5),
        json!(1e308),
        json!(1e-308),
        json!(u64::MAX),
        json!(i64::MIN),
        json!([0]),
        json!([null]),
        json!({"rope_type": "yarn", "factor": 1e308}),
        json!({"rope_type": "llama3"}),
        json!("absent"),
        json!({"rope_type": "yarn", "factor": 1e-308, "mscale": 1e308, "mscale_all_dim": -1e308}),
        json!({"type": "linear", "factor": 1e-308}),
    ];
    let rope_fields =
        ["rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor"];
    let fields: Vec<String> = base().keys().cloned().chain(rope_fields.map(str::to_owned)).collect();
    for field in &fields {
        for value in &values {
            let Ok(spec) = with(json!({ field: value })) else { continue };
            let (heads, rope) = (spec.head_shape(), &spec.ropes[0]);
            assert_eq!(heads.num_heads % heads.num_kv_heads, 0);
            assert!(rope.dim.is_multiple_of(2) && rope.dim > 0 && spec.vocab_size > 0);
            assert!(rope.attention_factor().is_finite() && rope.attention_factor() > 0.0, "{field} {value}");
            let _ = (spec.tensors(), rope.inv_freq(64));
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_are_no_config(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(ModelSpec::from_json(Path::new("config.json"), &bytes).is_err());
    }
}
