//! Results: a line each for people, and one JSON file for the folder of results.

use std::path::Path;

use serde_json::{Value, json};

use super::limits::Limits;

/// What a case must do at least.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Bytes read and written once.
    pub bytes: f64,
    /// Floating-point operations.
    pub flops: f64,
}

/// The results so far.
pub struct Table {
    facts: Value,
    limits: Option<Limits>,
    results: Vec<Value>,
    failures: usize,
}

impl Table {
    /// An empty one. `facts` is an object of what holds for all results.
    pub fn new(facts: Value) -> Self {
        Self { facts, limits: None, results: Vec::new(), failures: 0 }
    }

    /// Sets what floors are computed with, and prints it.
    pub fn set_limits(&mut self, limits: Limits) {
        println!("floors: {:.0} GB/s, {:.1} TFLOP/s\n", limits.bandwidth / 1e9, limits.flops / 1e12);
        self.facts["bandwidth_bytes_per_second"] = json!(limits.bandwidth);
        self.facts["peak_flops"] = json!(limits.flops);
        self.limits = Some(limits);
    }

    /// Adds a fact.
    pub fn fact(&mut self, name: &str, value: Value) {
        self.facts[name] = value;
    }

    /// Adds and prints the time of one call.
    pub fn kernel(&mut self, name: &str, seconds: f64, cost: Cost) {
        let floor = self.limits.map_or(f64::NAN, |limits| limits.floor(cost.bytes, cost.flops));
        println!(
            "{name:34} {:11.2} us {:9.1} GB/s {:8.1} TFLOP/s   floor {:10.2} us   {:5.1} % of it",
            seconds * 1e6,
            cost.bytes / seconds / 1e9,
            cost.flops / seconds / 1e12,
            floor * 1e6,
            100.0 * floor / seconds
        );
        self.results.push(json!({
            "name": name, "seconds": seconds, "bytes": cost.bytes, "flops": cost.flops,
            "floor_seconds": floor, "of_floor": floor / seconds,
        }));
    }

    /// Adds the time of a model's step that computes or generates `tokens` tokens, with more figures in `more`.
    pub fn step(&mut self, name: &str, tokens: usize, seconds: f64, floor: f64, more: Value) {
        println!(
            "{name:28} {:9.3} ms {:10.1} tok/s   floor {:9.3} ms   {:5.1} % of it",
            seconds * 1e3,
            tokens as f64 / seconds,
            floor * 1e3,
            100.0 * floor / seconds
        );
        self.results.push(json!({
            "name": name, "seconds": seconds, "tokens": tokens, "tokens_per_second": tokens as f64 / seconds,
            "floor_seconds": floor, "of_floor": floor / seconds, "more": more,
        }));
    }

    /// A case that this build cannot compute: not a failure, but never silent.
    pub fn skipped(&mut self, name: &str, reason: &str) {
        println!("{name:34} skipped: {reason}");
        self.results.push(json!({ "name": name, "skipped": reason }));
    }

    /// A case that should have worked.
    pub fn failed(&mut self, name: &str, error: &str) {
        println!("{name:34} FAILED: {error}");
        self.failures += 1;
        self.results.push(json!({ "name": name, "failed": error }));
    }

    /// Cases with a time.
    pub fn num_measured(&self) -> usize {
        self.results.iter().filter(|result| result.get("seconds").is_some()).count()
    }

    /// Cases that failed.
    pub fn num_failed(&self) -> usize {
        self.failures
    }

    /// Everything as JSON.
    pub fn to_json(&self) -> Value {
        let mut all = self.facts.clone();
        all["results"] = json!(self.results);
        all
    }

    /// Writes the JSON, if there is a file to write to, and fails if a case failed or nothing was measured.
    ///
    /// # Errors
    /// As said; or the file cannot be written.
    pub fn finish(&self, path: Option<&Path>) -> Result<(), super::Error> {
        if let Some(path) = path {
            std::fs::write(path, serde_json::to_string_pretty(&self.to_json())?)?;
        }
        match (self.num_failed(), self.num_measured()) {
            (0, 0) => Err("nothing was measured".into()),
            (0, _) => Ok(()),
            (failed, _) => Err(format!("{failed} cases failed").into()),
        }
    }
}
