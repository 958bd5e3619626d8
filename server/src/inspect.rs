//! `tidemill inspect`: what a model folder holds, for people and for programs.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

use tidemill_engine::inspect::{self, DeviceFit, GenerationFacts, Inspection};

use crate::{
    config::InspectConfig,
    exit::{Exit, Failure},
    terminal::printable,
};

/// Prints what was found to stdout.
///
/// # Errors
/// The first thing that `serve` would fail with, with its exit code.
pub fn inspect(config: &InspectConfig) -> Result<(), Failure> {
    let found = inspect::inspect(&config.engine);
    let text = if config.json { json(&found)? } else { printable(&page(&found)).into_owned() };
    let mut stdout = io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(Failure::runtime(format_args!("stdout: {error}")));
        }
        _ => {}
    }
    match found.problems.first() {
        None => Ok(()),
        Some(problem) => Err(Failure::new(Exit::Model, problem)),
    }
}

fn json(found: &Inspection) -> Result<String, Failure> {
    serde_json::to_string_pretty(found).map(|json| json + "\n").map_err(Failure::runtime)
}

/// One line to a fact.
struct Page(String);

impl Page {
    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{name:<15}{value}");
    }
}

fn page(found: &Inspection) -> String {
    let mut page = Page(String::new());
    page.line("model", &found.path);
    if let Some(architecture) = &found.architecture {
        page.line("architecture", architecture);
    }
    if let Some(all) = found.parameters {
        let active = found.active_parameters.filter(|&active| active != all);
        let active = active.map_or(String::new(), |active| format!(", {} active per token", count(active)));
        page.line("parameters", format_args!("{}{active}", count(all)));
    }
    for kind in &found.weights {
        page.line(
            "weights",
            format_args!("{} tensors of {}, {}", kind.tensors, kind.dtype, size(kind.bytes)),
        );
    }
    if let (Some(needed), Some(all)) = (found.weight_bytes, found.file_bytes) {
        page.line("memory", format_args!("{} for weights ({} in the files)", size(needed), size(all)));
    }
    for (dtype, bytes) in &found.kv_bytes_per_token {
        page.line("", format_args!("{} per token of KV cache in {dtype}", size(*bytes)));
    }
    if let Some(tokens) = found.max_model_len {
        page.line("context", format_args!("{tokens} tokens"));
    }
    if let Some(vocabulary) = found.vocab_size {
        page.line("vocabulary", vocabulary);
    }
    if let Some(tokenizer) = &found.tokenizer {
        page.line(
            "tokenizer",
            format_args!("{}, {} special tokens", tokenizer.kind, tokenizer.special_tokens),
        );
        page.line("chat template", found.chat_template.as_deref().unwrap_or("none"));
    }
    if let Some(generation) = &found.generation {
        page.line("generation", defaults(generation));
    }
    if let Some(pooling) = found.pooling {
        let only = if found.is_only_embedding { "; it generates nothing" } else { "" };
        page.line("embeddings", format_args!("{pooling} pooling{only}"));
    }
    found.devices.iter().for_each(|device| fit(&mut page, device));
    for problem in &found.problems {
        page.line("would fail", problem);
    }
    page.0
}

fn fit(page: &mut Page, device: &DeviceFit) {
    let DeviceFit {
        device,
        name,
        memory_bytes,
        weight_bytes,
        kv_cache_dtype,
        kv_tokens,
        default_kv_tokens,
        sequences,
    } = device;
    page.line(
        device,
        format_args!("{name}: {} of memory, {} for weights", size(*memory_bytes), size(*weight_bytes)),
    );
    if kv_tokens == &0 {
        page.line("", "the weights do not fit, or leave no room for keys and values");
        return;
    }
    let most = if default_kv_tokens < kv_tokens {
        format!("; --kv-cache-memory is needed for more than {default_kv_tokens}")
    } else {
        String::new()
    };
    page.line("", format_args!("room for {kv_tokens} tokens in {kv_cache_dtype}{most}"));
    let each = sequences.iter().map(|fit| format!("{} x {}", fit.sequences, fit.context));
    page.line("", format_args!("sequences x tokens: {}", each.collect::<Vec<_>>().join(", ")));
}

fn defaults(generation: &GenerationFacts) -> String {
    let GenerationFacts { eos_token_ids, temperature, top_k, top_p, repetition_penalty, max_new_tokens } =
        generation;
    let mut text = format!("ends with {eos_token_ids:?}");
    let numbers =
        [("temperature", temperature), ("top_p", top_p), ("repetition_penalty", repetition_penalty)];
    for (name, value) in numbers {
        value.iter().for_each(|value| text.push_str(&format!(", {name} {value}")));
    }
    for (name, value) in [("top_k", top_k), ("max_new_tokens", max_new_tokens)] {
        value.iter().for_each(|value| text.push_str(&format!(", {name} {value}")));
    }
    text
}

/// A size in powers of 1024, as `--kv-cache-memory` takes it.
fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => format!("{:.2} {unit}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes} bytes"),
    }
}

fn count(number: u64) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M")];
    match units.into_iter().find(|(unit, _)| number as f64 >= *unit) {
        Some((unit, name)) => format!("{:.2}{name}", number as f64 / unit),
        None => number.to_string(),
    }
}
