//! `tidemill inspect` as people and programs meet it.

#![allow(clippy::unwrap_used)]
#![cfg(unix)]

use std::process::{Command, Output, Stdio};

fn output(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
    // The environment of whoever runs the tests must not decide.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TIDEMILL_")) {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Exit code 3, and words on stderr.
#[track_caller]
fn fails(args: &[&str], words: &[&str]) {
    let output = output(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?} does not say {word:?}: {text}");
    }
}

/// The path of a fixture of the engine's tests.
fn fixture(name: &str) -> String {
    format!("{}/../engine/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn inspect_says_what_serving_would_take() {
    let text = output(&["inspect", "builtin"]);
    assert_eq!(text.status.code(), Some(0), "{}", stderr(&text));
    for word in ["LlamaForCausalLM", "parameters", "KV cache", "tokenizer.json", "cpu", "chat template"] {
        assert!(stdout(&text).contains(word), "{word}: {}", stdout(&text));
    }
    let json = output(&["inspect", "builtin", "--json"]);
    let found: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(found["problems"], serde_json::json!([]));
    assert_eq!((&found["vocab_size"], &found["max_model_len"]), (&2048.into(), &1024.into()));
    assert_eq!(found["weight_bytes"], found["file_bytes"], "nothing in the file is left over");
    let weights = found["weights"].as_array().unwrap();
    assert_eq!(
        weights.iter().map(|kind| kind["parameters"].as_u64().unwrap()).sum::<u64>(),
        found["parameters"]
    );
    let cpu = &found["devices"][0];
    assert_eq!(cpu["device"], "cpu");
    let per_token = found["kv_bytes_per_token"][cpu["kv_cache_dtype"].as_str().unwrap()].as_u64().unwrap();
    let free = cpu["memory_bytes"].as_u64().unwrap() - cpu["weight_bytes"].as_u64().unwrap();
    assert_eq!(cpu["kv_tokens"].as_u64().unwrap(), free / per_token);
    assert_eq!(
        cpu["sequences"][0],
        serde_json::json!({"context": 1024, "sequences": free / per_token / 1024})
    );
}

#[test]
fn inspect_fails_with_the_words_of_serving() {
    let folder = fixture("llama");
    let asked = ["inspect", &folder, "--json"];
    let found: serde_json::Value = serde_json::from_slice(&output(&asked).stdout).unwrap();
    let problem = found["problems"][0].as_str().unwrap();
    fails(&asked, &[problem, "tokenizer.json", "--skip-tokenizer-init"]);
    fails(&["serve", "--grpc-port", "0", "--no-http", "--model", &folder], &[problem]);
    assert_eq!(output(&["inspect", &folder, "--skip-tokenizer-init"]).status.code(), Some(0));
    fails(&["inspect", "/no/such/model"], &["/no/such/model", "no such folder"]);
    // All that is wrong is said at once.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    std::fs::copy(fixture("llama/config.json"), dir.path().join("config.json")).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), "junk").unwrap();
    let found: serde_json::Value =
        serde_json::from_slice(&output(&["inspect", path, "--json"]).stdout).unwrap();
    let problems = found["problems"].as_array().unwrap();
    assert!(
        problems.iter().any(|problem| problem.as_str().unwrap().contains("model.safetensors")),
        "{problems:?}"
    );
    assert!(
        problems.iter().any(|problem| problem.as_str().unwrap().contains("tokenizer.json")),
        "{problems:?}"
    );
    let file = output(&["inspect", &fixture("llama/model.safetensors"), "--json"]);
    let one: serde_json::Value = serde_json::from_slice(&file.stdout).unwrap();
    assert!(
        file.status.success() && one["parameters"].as_u64().unwrap() > 0 && one["architecture"].is_null()
    );
}
