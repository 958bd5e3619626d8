use std::path::Path;

use tempfile::TempDir;
use tidemill_engine::{
    error::LoadError,
    model::{ModelFiles, ModelSource, ModelSpec},
};

fn open(dir: &Path) -> Result<ModelFiles, LoadError> {
    ModelFiles::open(&ModelSource::Dir(dir.to_path_buf()))
}

fn folder(names: &[&str]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for name in names {
        std::fs::write(dir.path().join(name), "{}").unwrap();
    }
    dir
}

#[test]
fn the_built_in_model_opens() {
    let files = ModelFiles::open(&ModelSource::Builtin).unwrap();
    assert!(files.contains("tokenizer.json") && !files.contains("model.safetensors.index.json"));
    assert!(files.path("config.json").display().to_string().contains("built-in"));
    assert_eq!(ModelSpec::load(&files).unwrap().architecture, "LlamaForCausalLM");
}

#[test]
fn a_folder_that_cannot_be_loaded_says_why() {
    let cases = [
        (vec!["config.json", "pytorch_model.bin"], ["pytorch_model.bin", "only safetensors"]),
        (vec!["config.json", "consolidated.00.pth"], ["consolidated.00.pth", "only safetensors"]),
        (vec!["llama.Q4_K_M.gguf"], ["llama.Q4_K_M.gguf", "cut short"]),
        (vec!["config.json", "README.md"], ["neither model.safetensors nor", "index.json"]),
        (vec!["model.safetensors"], ["no config.json", ""]),
    ];
    for (names, parts) in cases {
        let dir = folder(&names);
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{names:?}: {error}");
        assert!(error.contains(dir.path().to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_path_that_is_no_folder_says_what_to_pass() {
    let error = open(Path::new("/no/such/folder")).unwrap_err().to_string();
    assert!(error.contains("/no/such/folder") && error.contains("no such folder"), "{error}");
    let dir = folder(&["model.gguf", "model.safetensors"]);
    let error = open(&dir.path().join("model.gguf")).unwrap_err();
    assert!(matches!(error, LoadError::Format { .. }), "{error}");
    let error = open(&dir.path().join("model.safetensors")).unwrap_err().to_string();
    assert!(error.contains("pass the folder"), "{error}");
}

#[test]
fn files_over_their_limit_are_not_read() {
    let dir = folder(&["model.safetensors", "config.json"]);
    let huge = std::fs::File::create(dir.path().join("config.json")).unwrap();
    huge.set_len(1 << 40).unwrap();
    let error = ModelSpec::load(&open(dir.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("larger than"), "{error}");
}

/// Opening a pipe for reading blocks until somebody writes.
#[cfg(unix)]
#[test]
fn pipes_are_not_opened() {
    let dir = folder(&["config.json", "model.safetensors"]);
    let pipe = dir.path().join("tokenizer.json");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    if made.is_ok_and(|status| status.success()) {
        let files = open(dir.path()).unwrap();
        assert!(files.read("tokenizer.json").unwrap().is_none());
        assert!(files.map("tokenizer.json").is_err());
    }
}
