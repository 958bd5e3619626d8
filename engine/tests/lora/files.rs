//! Adapters that are wrong are refused with the name of what is wrong, and never more.

use std::{collections::HashMap, fs, path::Path};

use serde_json::{Value, json};
use tidemill_engine::{
    LoadError,
    model::{
        ModelFiles, ModelSource, ModelSpec,
        lora::{self, LoraWeights, Sites},
    },
};

use crate::{adapter, fixtures};

fn sites() -> Sites {
    let files = ModelFiles::open(&ModelSource::Dir(fixtures().join("llama"))).unwrap();
    Sites::of(&ModelSpec::load(&files).unwrap())
}

fn load(folder: &Path) -> Result<LoraWeights, LoadError> {
    lora::load(folder, Path::new("given"), &sites(), 8)
}

/// A copy of an adapter to be broken.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(adapter(name).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
}

#[track_caller]
fn refused(result: Result<LoraWeights, LoadError>, words: &[&str]) {
    let error = result.expect_err("it is wrong").to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} does not say {word:?}");
    }
    assert!(!error.contains("/tmp"), "{error:?} names a folder of the server");
}

#[test]
fn fields_that_would_change_what_is_computed_are_refused_by_name() {
    let folder = copy("llama_all");
    let before = config(folder.path());
    let cases: [(&str, Value); 17] = [
        ("peft_type", json!("IA3")),
        ("use_dora", json!(true)),
        ("alora_invocation_tokens", json!([1, 2])),
        ("modules_to_save", json!(["lm_head"])),
        ("bias", json!("all")),
        ("lora_bias", json!(true)),
        ("rank_pattern", json!({"q_proj": 2})),
        ("alpha_pattern", json!({"q_proj": 2})),
        ("layer_replication", json!([[0, 1]])),
        ("target_parameters", json!(["experts.gate_up_proj"])),
        ("trainable_token_indices", json!([5])),
        ("use_qalora", json!(true)),
        ("r", json!(0)),
        ("r", json!("8")),
        ("lora_alpha", json!("16")),
        ("use_rslora", json!(1)),
        ("target_modules", json!([1])),
    ];
    for (field, value) in cases {
        let mut config = before.clone();
        config[field] = value;
        fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        refused(load(folder.path()), &["given/adapter_config.json", field]);
    }
    for text in ["", "[]", "{", "nonsense", "\u{0}"] {
        fs::write(folder.path().join("adapter_config.json"), text).unwrap();
        refused(load(folder.path()), &["given/adapter_config.json"]);
    }
}

#[test]
fn a_rank_over_the_servers_or_other_than_the_matrices_is_refused() {
    let folder = copy("llama_all");
    for (rank, words) in [(9, "--max-lora-rank 8"), (4, "lora_A.weight")] {
        let mut config = config(folder.path());
        config["r"] = json!(rank);
        fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        refused(load(folder.path()), &[words]);
    }
}

/// Writes a safetensors file of zeros in f32.
fn write(folder: &Path, tensors: &HashMap<String, Vec<usize>>) {
    let bytes: HashMap<_, _> =
        tensors.iter().map(|(name, shape)| (name, vec![0_u8; 4 * shape.iter().product::<usize>()])).collect();
    let view = |name: &String| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, tensors[name].clone(), &bytes[name])
            .unwrap()
    };
    let views = tensors.keys().map(|name| (name.clone(), view(name)));
    safetensors::serialize_to_file(views, None, &folder.join("adapter_model.safetensors")).unwrap();
}

#[test]
fn matrices_that_the_model_lacks_or_that_do_not_fit_are_refused_by_name() {
    let folder = copy("llama_qv");
    let mut whole = HashMap::new();
    for layer in 0..2 {
        for (name, n) in [("q_proj", 64), ("v_proj", 32)] {
            let module = format!("base_model.model.model.layers.{layer}.self_attn.{name}");
            whole.insert(format!("{module}.lora_A.weight"), vec![3, 64]);
            whole.insert(format!("{module}.lora_B.weight"), vec![n, 3]);
        }
    }
    write(folder.path(), &whole);
    assert!(load(folder.path()).is_ok());
    let q = "base_model.model.model.layers.1.self_attn.q_proj";
    let more = [
        ("base_model.model.model.embed_tokens.lora_embedding_A", vec![3, 256], "embed_tokens"),
        ("base_model.model.lm_head.lora_A.weight", vec![3, 64], "lm_head"),
        (
            "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
            vec![3, 64],
            "layers.2.self_attn.q_proj",
        ),
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector", vec![64], "magnitude"),
        ("model.layers.1.self_attn.q_proj.lora_A.weight", vec![3, 64], "twice"),
    ];
    for (name, shape, word) in more {
        let mut tensors = whole.clone();
        tensors.insert(name.to_owned(), shape);
        write(folder.path(), &tensors);
        refused(load(folder.path()), &["given/adapter_model.safetensors", word]);
    }
    for (name, shape) in
        [("lora_A", vec![64, 3]), ("lora_A", vec![3, 32]), ("lora_B", vec![32, 3]), ("lora_B", vec![192])]
    {
        let mut tensors = whole.clone();
        tensors.insert(format!("{q}.{name}.weight"), shape);
        write(folder.path(), &tensors);
        refused(load(folder.path()), &["given/adapter_model.safetensors", "layers.1.self_attn.q_proj", name]);
    }
    for half in ["lora_A", "lora_B"] {
        let mut tensors = whole.clone();
        tensors.remove(&format!("{q}.{half}.weight"));
        write(folder.path(), &tensors);
        refused(load(folder.path()), &["is missing", half]);
    }
    // Both halves, of a module that the configuration names.
    whole.retain(|name, _| !name.starts_with(q));
    write(folder.path(), &whole);
    refused(load(folder.path()), &["is missing", "layers.1.self_attn.q_proj"]);
}

#[test]
fn files_that_are_cut_short_or_flipped_end_in_an_error_or_in_other_numbers() {
    let folder = copy("llama_all");
    let path = folder.path().join("adapter_model.safetensors");
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(whole.len().div_ceil(200)) {
        fs::write(&path, &whole[..at]).unwrap();
        refused(load(folder.path()), &["given/adapter_model.safetensors"]);
    }
    for at in (0..4096.min(whole.len())).step_by(13) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, &bytes).unwrap();
        // A flipped bit in a name or an extent is refused; none may panic.
        let _ = load(folder.path());
    }
    fs::write(&path, vec![b' '; 40 << 20]).unwrap();
    refused(load(folder.path()), &["larger than"]);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    refused(load(folder.path()), &["not a file"]);
}
