//! Low-rank adapters: against transformers, in mixed batches, under traffic, and in files that are wrong.

#![allow(clippy::unwrap_used)]

mod files;
mod goldens;
mod traffic;

use std::path::PathBuf;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn adapter(name: &str) -> PathBuf {
    fixtures().join("lora").join(name)
}
