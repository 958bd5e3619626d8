//! Quantised weights, and quantised keys and values.

use tidemill_engine::model::files::ModelSource;
use tidemill_kernels::{
    DType,
    cpu::{Compute, Isa},
};

use crate::{
    BF16_TOLERANCE, check_bf16, check_f32,
    reference::{Golden, Model, fixture, max_difference, range},
};

/// Made by `scripts/make_quantized_goldens.py` and `scripts/make_gguf_goldens.py`: the references computed with the weights that each format's definition gives.
const QUANTIZED: [&str; 11] = [
    "quantized/fp8_tensor",
    "quantized/fp8_block",
    "quantized/fp8_channel",
    "quantized/awq",
    "quantized/gptq",
    "quantized/gptq_int8",
    "quantized/packed_int4",
    "quantized/packed_int8",
    "quantized/int8",
    "gguf/llama",
    "gguf/qwen2",
];

#[test]
fn quantised_models_equal_transformers_with_dequantised_weights() {
    for name in QUANTIZED {
        check_f32(name);
        check_bf16(name, BF16_TOLERANCE);
    }
}

/// An element of F8E4M3 is off by up to 1/16 of itself, and by 1/45 in the mean; what comes of it depends on the model. A cache that is read in another
/// way than it was written gives logits that are off by more than half their range.
#[test]
fn keys_and_values_in_fp8_move_logits_by_a_tenth_of_their_range_at_most() {
    for name in ["llama", "llama_linear"] {
        let golden = Golden::load(name);
        for isa in Isa::available() {
            for i in 0..golden.prompts() {
                let source = ModelSource::Dir(fixture(name));
                let prompt = &golden.ids[&format!("input_ids.{i}")];
                let mut model = Model::load(source, Compute::F32, isa, prompt.len());
                model.keep_kv_in(DType::F8E4M3);
                let expected = &golden.floats[&format!("logits.{i}")];
                let logits = model.run(0, prompt);
                let got: Vec<f32> = logits[logits.len() - expected.len() / model.vocab..].concat();
                let share = max_difference(&got, expected) / range(expected);
                assert!(0.0 < share && share <= 0.1, "{name}, prompt {i}, {isa:?}: {share} of the range");
            }
        }
    }
}
