//! The decoder against Hugging Face transformers, from fixtures that `scripts/make_goldens.py` computed in float32.
//!
//! In float32 the logits agree within 1e-4 and the greedy tokens are equal. In bfloat16 the inputs of every product are rounded, so
//! logits agree within 2 % of their range, on every instruction set that this machine has.

#![allow(clippy::unwrap_used)]

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use safetensors::SafeTensors;
use tidemill_engine::model::{
    checkpoint::Checkpoint,
    decoder::{Decoder, DecoderLimits},
    files::{ModelFiles, ModelSource},
    spec::ModelSpec,
};
use tidemill_kernels::{
    DType,
    cpu::{Compute, CpuConfig, CpuOps, Isa},
    ops::BatchMeta,
};

const TINY: [&str; 5] = ["llama", "llama3_rope", "llama_bias", "llama_linear", "llama_yarn"];
const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 24;
const F32_TOLERANCE: f32 = 1e-4;
const BF16_TOLERANCE: f32 = 0.02;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The reference's tensors as vectors of f32 or of token ids.
struct Golden {
    floats: HashMap<String, Vec<f32>>,
    ids: HashMap<String, Vec<u32>>,
}

impl Golden {
    fn load(name: &str) -> Self {
        let bytes = std::fs::read(fixture(name).join("golden.safetensors")).unwrap();
        let (mut floats, mut ids) = (HashMap::new(), HashMap::new());
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let words = tensor.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
            if name.starts_with("logits") {
                floats.insert(name, words.map(f32::from_le_bytes).collect());
            } else {
                ids.insert(name, words.map(u32::from_le_bytes).collect());
            }
        }
        Self { floats, ids }
    }

    fn prompts(&self) -> usize {
        self.floats.len()
    }
}

struct Model {
    decoder: Decoder<CpuOps>,
    vocab: usize,
}

impl Model {
    fn load(source: ModelSource, compute: Compute, isa: Isa) -> Self {
        let files = ModelFiles::open(&source).unwrap();
        let spec = ModelSpec::load(&files).unwrap();
        let checkpoint = Checkpoint::open(&files).unwrap();
        let kv = spec.kv_shape(
            NUM_BLOCKS,
            BLOCK_SIZE,
            if compute == Compute::F32 { DType::F32 } else { DType::Bf16 },
        );
        let limits = DecoderLimits {
            max_num_batched_tokens: 384,
            max_model_len: 384.min(spec.max_position_embeddings),
        };
        let ops = CpuOps::new(CpuConfig { compute, isa: Some(isa), threads: Some(2) }).unwrap();
        let mut decoder = Decoder::load(ops, &spec, &checkpoint, limits, |_| ()).unwrap();
        decoder.allocate_kv(kv).unwrap();
        Self { decoder, vocab: spec.vocab_size }
    }

    /// Computes `tokens` at positions from `start` on, in blocks that do not lie in order, and gives the logits of all of them.
    fn run(&mut self, start: usize, tokens: &[u32]) -> Vec<Vec<f32>> {
        let blocks: Vec<u32> = (0..NUM_BLOCKS as u32).map(|i| (i * 7 + 3) % NUM_BLOCKS as u32).collect();
        let end = start + tokens.len();
        let slot = |p: usize| blocks[p / BLOCK_SIZE] * BLOCK_SIZE as u32 + (p % BLOCK_SIZE) as u32;
        let meta = BatchMeta {
            token_ids: tokens.to_vec(),
            positions: (start..end).map(|p| p as u32).collect(),
            slot_mapping: (start..end).map(slot).collect(),
            cu_seqlens_q: vec![0, tokens.len() as u32],
            context_lens: vec![end as u32],
            block_tables: blocks.clone(),
            max_blocks: blocks.len(),
            logits_indices: (0..tokens.len() as u32).collect(),
            state_indices: Vec::new(),
            ..BatchMeta::default()
        };
        let logits = self.decoder.logits(Arc::new(meta)).unwrap();
        logits.chunks_exact(self.vocab).map(<[f32]>::to_vec).collect()
    }
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap() as u32
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn range(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::MIN, f32::max) - values.iter().copied().fold(f32::MAX, f32::min)
}

/// Compares prompt logits (the last `logits` of the prompt that the fixture holds) and, in f32, the greedy continuation.
fn check(name: &str, source: impl Fn() -> ModelSource, compute: Compute, isa: Isa) {
    let golden = Golden::load(name);
    assert!(golden.prompts() >= 3, "{name}: too few prompts");
    for i in 0..golden.prompts() {
        let mut model = Model::load(source(), compute, isa);
        let prompt = &golden.ids[&format!("input_ids.{i}")];
        let expected = &golden.floats[&format!("logits.{i}")];
        let logits = model.run(0, prompt);
        let compared = expected.len() / model.vocab;
        let got: Vec<f32> = logits[logits.len() - compared..].concat();
        let difference = max_difference(&got, expected);
        let tolerance =
            if compute == Compute::F32 { F32_TOLERANCE } else { BF16_TOLERANCE * range(expected) };
        assert!(
            difference <= tolerance,
            "{name}, prompt {i}, {isa:?}: logits differ by {difference}, over {tolerance}"
        );
        if compute == Compute::F32 {
            let greedy = &golden.ids[&format!("greedy_ids.{i}")];
            let mut token = argmax(logits.last().unwrap());
            for (step, &expected) in greedy.iter().enumerate() {
                assert_eq!(token, expected, "{name}, prompt {i}, {isa:?}: greedy token {step}");
                token = argmax(&model.run(prompt.len() + step, &[token])[0]);
            }
        }
    }
}

#[test]
fn tiny_models_equal_transformers_in_f32_on_every_instruction_set() {
    for name in TINY {
        for isa in Isa::available() {
            check(name, || ModelSource::Dir(fixture(name)), Compute::F32, isa);
        }
    }
}

#[test]
fn tiny_models_agree_with_transformers_in_bf16() {
    for name in TINY {
        for isa in Isa::available() {
            check(name, || ModelSource::Dir(fixture(name)), Compute::Bf16, isa);
        }
    }
}

#[test]
fn the_built_in_model_equals_transformers() {
    check("demo", || ModelSource::Builtin, Compute::F32, Isa::detect());
    check("demo", || ModelSource::Builtin, Compute::Bf16, Isa::detect());
}

#[test]
fn chunks_give_the_same_bits_as_the_whole_prompt() {
    let golden = Golden::load("llama");
    let prompt = &golden.ids["input_ids.2"];
    for compute in [Compute::F32, Compute::Bf16] {
        let source = || ModelSource::Dir(fixture("llama"));
        let whole = Model::load(source(), compute, Isa::detect()).run(0, prompt);
        for chunk in [1, 5, 16, 33] {
            let mut model = Model::load(source(), compute, Isa::detect());
            let pieces: Vec<_> =
                prompt.chunks(chunk).enumerate().flat_map(|(i, piece)| model.run(i * chunk, piece)).collect();
            assert!(pieces == whole, "chunks of {chunk} tokens change the bits");
        }
    }
}
