//! The walls of the house (`engine/ARCHITECTURE.md`): which crate and which module may name which.
//!
//! Read from the source and from `Cargo.toml`s as text, so a broken wall fails here and not in a review.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("server/ lies in the workspace").to_owned()
}

/// All Rust sources under a folder or at a file, with comments and doc comments removed.
fn sources(place: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut open = vec![root().join(place)];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let code = text
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .collect::<Vec<_>>()
                .join("\n");
            found.push((path, code));
        }
    }
    assert!(!found.is_empty(), "{place} holds no source: the rule checks nothing");
    found
}

/// Fails when a source of `place` names one of `forbidden`.
fn never_names(place: &str, forbidden: &[&str]) {
    for (path, code) in sources(place) {
        for word in forbidden {
            assert!(!code.contains(word), "{} names {word}", path.display());
        }
    }
}

/// Names of all packages that a crate's manifest mentions as dependencies of its library or binary.
fn dependencies(package: &str) -> Vec<String> {
    let manifest = fs::read_to_string(root().join(package).join("Cargo.toml")).unwrap();
    let section = manifest.split("[dependencies]").nth(1).expect("has dependencies");
    let section = section.split("\n[").next().unwrap();
    section
        .lines()
        .filter_map(|line| line.split(['.', ' ', '=']).next())
        .filter(|n| !n.is_empty())
        .map(Into::into)
        .collect()
}

#[test]
fn crates_depend_on_each_other_in_one_direction() {
    let allowed: [(&str, &[&str]); 5] = [
        ("kernels", &[]),
        ("proto", &[]),
        ("engine", &["tidemill-kernels"]),
        ("benches", &["tidemill-engine", "tidemill-kernels", "tidemill-proto"]),
        ("server", &["tidemill-engine", "tidemill-proto", "tidemill-benches"]),
    ];
    for (package, allowed) in allowed {
        for dependency in dependencies(package).iter().filter(|name| name.starts_with("tidemill")) {
            assert!(allowed.contains(&dependency.as_str()), "{package} depends on {dependency}");
        }
    }
}

#[test]
fn the_engine_knows_no_network() {
    let network = ["tonic", "prost", "tokio", "hyper", "http", "axum", "tower"];
    for dependency in dependencies("engine").iter().chain(&dependencies("kernels")) {
        assert!(
            !network.iter().any(|name| dependency.starts_with(name)),
            "the engine depends on {dependency}"
        );
    }
}

#[test]
fn scheduler_kv_and_ledger_run_without_kernels_model_or_text() {
    let rooms = [
        "tidemill_kernels",
        "crate::model",
        "crate::text",
        "crate::runner",
        "crate::request",
        "Instant::now",
    ];
    for place in ["engine/src/scheduler", "engine/src/kv", "engine/src/ledger", "engine/src/sampling.rs"] {
        never_names(place, &rooms);
        for (path, code) in sources(place) {
            let uses =
                code.split("use crate::{").nth(1).and_then(|rest| rest.split("};").next()).unwrap_or("");
            for room in ["model::", "text::", "runner::", "request::"] {
                assert!(!uses.contains(room), "{} uses {room}", path.display());
            }
        }
    }
}

#[test]
fn bugs_are_planted_by_the_engines_own_tests_alone() {
    for package in ["kernels", "kernels/emu", "engine", "proto", "benches", "server"] {
        let manifest = fs::read_to_string(root().join(package).join("Cargo.toml")).unwrap();
        let asking = manifest.lines().filter(|line| line.contains("\"planted\"")).count();
        assert_eq!(asking, usize::from(package == "engine"), "{package} asks for planted bugs");
        assert!(!manifest.contains("default = [\"planted"), "{package} plants bugs by default");
    }
    let manifest = fs::read_to_string(root().join("engine/Cargo.toml")).unwrap();
    let tests_only = manifest.split("[dev-dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    assert!(tests_only.contains("features = [\"planted\"]"), "a dependency of the tests asks for them");
}

#[test]
fn the_model_sees_batch_metadata_and_no_sequence() {
    never_names("engine/src/model", &["scheduler", "ledger", "SeqId", "BlockPool", "crate::request"]);
}

#[test]
fn kernels_know_no_requests() {
    never_names("kernels/src", &["Request", "Sequence", "config.json", "tidemill_engine"]);
}

#[test]
fn cudarc_is_named_in_one_place() {
    let elsewhere =
        ["engine/src", "server/src", "proto/src", "benches/src", "kernels/emu", "kernels/src/cpu"];
    let beside =
        ["kernels/src/error.rs", "kernels/src/ops", "kernels/src/sampling.rs", "kernels/src/tensor.rs"];
    for place in elsewhere.iter().chain(&beside) {
        never_names(place, &["cudarc"]);
    }
}

#[test]
fn only_the_arguments_read_the_environment() {
    for place in ["engine/src", "kernels/src", "proto/src", "benches/src", "server/src"] {
        for (path, code) in sources(place) {
            let reads = code.contains("env::var") || code.contains("env::vars");
            assert!(
                !reads || path.ends_with("server/src/args.rs"),
                "{} reads the environment",
                path.display()
            );
        }
    }
}

#[test]
fn files_hold_one_concept() {
    for place in ["engine/src", "kernels/src", "proto/src", "benches/src", "server/src"] {
        for (path, _) in sources(place) {
            let lines = fs::read_to_string(&path).unwrap().lines().count();
            assert!(lines <= 500, "{} has {lines} lines: which concept wants its own room?", path.display());
        }
    }
}
