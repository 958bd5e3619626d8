//! The decoder against Hugging Face transformers, from fixtures that `scripts/make_goldens.py` computed in float32.
//!
//! In float32 the logits agree within 1e-4 and the greedy tokens are equal. In bfloat16 the inputs of every product are rounded, so
//! logits agree within 2 % of their range (4 % where norms of queries and keys or bounds make more of it), on every instruction set that this machine has. Of mixtures of experts they are not
//! compared: rounding can send a token to another expert.
//!
//! For each fixture a line that begins with `golden ` is printed; `scripts/model-table` makes the table of the README of them.

#![allow(clippy::unwrap_used)]

mod mutations;
mod quantized;
mod reference;

use tidemill_engine::model::files::ModelSource;
use tidemill_kernels::cpu::{Compute, Isa};

use crate::reference::{Golden, Model, argmax, fixture, max_difference, range};

const TINY: [&str; 5] = ["llama", "llama3_rope", "llama_bias", "llama_linear", "llama_yarn"];
/// Dense models, and the share of their range that bfloat16 may move their logits.
const DENSE: [(&str, f32); 23] = [
    ("mistral", 0.02),
    ("granite", 0.02),
    ("smollm3", 0.02),
    ("qwen2", 0.02),
    ("qwen2_window", 0.02),
    ("qwen3", 0.04),
    ("qwen3_yarn", 0.04),
    ("gemma1", 0.04),
    ("gemma2", 0.04),
    ("gemma3", 0.04),
    ("gemma3_pattern", 0.04),
    ("phi3", 0.02),
    ("phi3_longrope", 0.02),
    ("olmo2", 0.04),
    ("cohere", 0.04),
    ("falcon7b", 0.02),
    ("falcon40b", 0.02),
    ("falcon11b", 0.02),
    ("falcon_rw", 0.02),
    ("gpt2", 0.02),
    ("gpt_neox", 0.02),
    ("gpt_neox_sequential", 0.02),
    ("starcoder2", 0.02),
];
const EXPERTS: [&str; 6] = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"];
const F32_TOLERANCE: f32 = 1e-4;
const BF16_TOLERANCE: f32 = 0.02;

/// Compares prompt logits (the last `logits` of the prompt that the fixture holds) and, in f32, the greedy continuation. Gives the class name and
/// by how much logits differ at most, in bfloat16 as a share of their range.
fn check(
    name: &str,
    source: impl Fn() -> ModelSource,
    (compute, isa): (Compute, Isa),
    tolerance: f32,
) -> (&'static str, f32) {
    let golden = Golden::load(name);
    assert!(golden.prompts() >= 3, "{name}: too few prompts");
    let (mut worst, mut architecture) = (0.0_f32, "");
    for i in 0..golden.prompts() {
        let prompt = &golden.ids[&format!("input_ids.{i}")];
        let greedy = &golden.ids[&format!("greedy_ids.{i}")];
        let expected = &golden.floats[&format!("logits.{i}")];
        let mut model = Model::load(source(), compute, isa, prompt.len() + greedy.len());
        architecture = model.architecture;
        let logits = model.run(0, prompt);
        let compared = expected.len() / model.vocab;
        let got: Vec<f32> = logits[logits.len() - compared..].concat();
        let scale = if compute == Compute::F32 { 1.0 } else { range(expected) };
        let difference = max_difference(&got, expected) / scale;
        assert!(
            difference <= tolerance,
            "{name}, prompt {i}, {isa:?}: logits differ by {difference}, over {tolerance}"
        );
        worst = worst.max(difference);
        if compute == Compute::F32 {
            let mut token = argmax(logits.last().unwrap());
            for (step, &expected) in greedy.iter().enumerate() {
                assert_eq!(token, expected, "{name}, prompt {i}, {isa:?}: greedy token {step}");
                token = argmax(&model.run(prompt.len() + step, &[token])[0]);
            }
        }
    }
    (architecture, worst)
}

/// In float32, on every instruction set; prints the line for the table.
fn check_f32(name: &str) {
    let source = || ModelSource::Dir(fixture(name));
    let (mut worst, mut of) = (0.0_f32, "");
    for isa in Isa::available() {
        let (architecture, difference) = check(name, source, (Compute::F32, isa), F32_TOLERANCE);
        (worst, of) = (worst.max(difference), architecture);
    }
    println!(
        r#"golden {{"fixture": "{name}", "architecture": "{of}", "device": "cpu", "max_error": {worst:e}}}"#
    );
}

fn check_bf16(name: &str, tolerance: f32) {
    for isa in Isa::available() {
        check(name, || ModelSource::Dir(fixture(name)), (Compute::Bf16, isa), tolerance);
    }
}

#[test]
fn tiny_models_equal_transformers_in_f32_on_every_instruction_set() {
    TINY.into_iter().for_each(check_f32);
}

#[test]
fn tiny_models_agree_with_transformers_in_bf16() {
    TINY.into_iter().for_each(|name| check_bf16(name, BF16_TOLERANCE));
}

#[test]
fn every_dense_family_equals_transformers_in_f32_on_every_instruction_set() {
    DENSE.into_iter().for_each(|(name, _)| check_f32(name));
}

#[test]
fn every_dense_family_agrees_with_transformers_in_bf16() {
    DENSE.into_iter().for_each(|(name, tolerance)| check_bf16(name, tolerance));
}

#[test]
fn every_mixture_of_experts_equals_transformers_in_f32_on_every_instruction_set() {
    EXPERTS.into_iter().for_each(check_f32);
}

#[test]
fn the_built_in_model_equals_transformers() {
    for (compute, tolerance) in [(Compute::F32, F32_TOLERANCE), (Compute::Bf16, BF16_TOLERANCE)] {
        check("demo", || ModelSource::Builtin, (compute, Isa::detect()), tolerance);
    }
}

#[test]
fn chunks_give_the_same_bits_as_the_whole_prompt() {
    let golden = Golden::load("llama");
    let prompt = &golden.ids["input_ids.2"];
    for compute in [Compute::F32, Compute::Bf16] {
        let source = || ModelSource::Dir(fixture("llama"));
        let whole = Model::load(source(), compute, Isa::detect(), prompt.len()).run(0, prompt);
        for chunk in [1, 5, 16, 33] {
            let mut model = Model::load(source(), compute, Isa::detect(), prompt.len());
            let pieces: Vec<_> =
                prompt.chunks(chunk).enumerate().flat_map(|(i, piece)| model.run(i * chunk, piece)).collect();
            assert!(pieces == whole, "chunks of {chunk} tokens change the bits");
        }
    }
}
