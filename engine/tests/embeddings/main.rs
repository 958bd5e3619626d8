//! Embeddings: against Hugging Face transformers, and the promise that their bits depend on the request alone.

#![allow(clippy::unwrap_used)]

mod goldens;
mod invariance;

use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;
use tidemill_engine::Pooling;

/// A model folder as sentence-transformers leaves it: the files of `model`, and beside them which pooling to use.
fn folder(model: &Path, pooling: Pooling, normalize: bool) -> TempDir {
    let dir = TempDir::new().unwrap();
    for entry in fs::read_dir(model).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let module = |idx: usize, name: &str, path: &str| {
        let kind = format!("sentence_transformers.models.{name}");
        serde_json::json!({ "idx": idx, "name": idx.to_string(), "path": path, "type": kind })
    };
    let mut modules = vec![module(0, "Transformer", ""), module(1, "Pooling", "1_Pooling")];
    if normalize {
        modules.push(module(2, "Normalize", "2_Normalize"));
    }
    fs::write(dir.path().join("modules.json"), serde_json::to_vec(&modules).unwrap()).unwrap();
    let field = match pooling {
        Pooling::Last => "pooling_mode_lasttoken",
        Pooling::Mean => "pooling_mode_mean_tokens",
        Pooling::Cls => "pooling_mode_cls_token",
        other => unreachable!("no test asks for {other:?}"),
    };
    let mut config = serde_json::json!({
        "pooling_mode_cls_token": false,
        "pooling_mode_mean_tokens": false,
        "pooling_mode_max_tokens": false,
        "include_prompt": true,
    });
    config[field] = true.into();
    fs::create_dir(dir.path().join("1_Pooling")).unwrap();
    fs::write(dir.path().join("1_Pooling/config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    dir
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn length(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}
