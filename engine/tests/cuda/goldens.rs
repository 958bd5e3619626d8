//! The decoder on CUDA kernels against Hugging Face transformers and against the CPU backend.

use std::{collections::HashMap, sync::Arc};

use safetensors::SafeTensors;
use tidemill_engine::model::{
    checkpoint::Checkpoint,
    decoder::{Decoder, DecoderLimits},
    files::{ModelFiles, ModelSource},
    spec::ModelSpec,
};
use tidemill_kernels::{
    DType, Ops,
    cpu::{Compute, CpuConfig, CpuOps},
    cuda::{CudaConfig, CudaOps, Device},
    ops::BatchMeta,
    sampling::RowTask,
};
use tidemill_kernels_emu::Schedule;

use crate::device::{driver, fixture};

const TINY: [&str; 5] = ["llama", "llama3_rope", "llama_bias", "llama_linear", "llama_yarn"];
const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 12;
const MAX_LEN: usize = NUM_BLOCKS * BLOCK_SIZE;
/// Logits differ by at most this share of their range from those computed in float32.
const TOLERANCE: f32 = 0.02;

fn source(name: &str) -> ModelSource {
    if name == "demo" { ModelSource::Builtin } else { ModelSource::Dir(fixture(name)) }
}

/// The reference's tensors as bits.
fn golden(name: &str) -> HashMap<String, Vec<u32>> {
    tensors(name, "golden.safetensors")
}

fn tensors(name: &str, file: &str) -> HashMap<String, Vec<u32>> {
    let bytes = std::fs::read(fixture(name).join(file)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let words =
        |data: &[u8]| data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    tensors.tensors().into_iter().map(|(name, tensor)| (name, words(tensor.data()))).collect()
}

/// A decoder with one sequence, in blocks that do not lie in order.
struct Model<O: Ops> {
    decoder: Decoder<O>,
    vocab: usize,
}

impl<O: Ops> Model<O> {
    fn load(name: &str, ops: impl FnOnce(&ModelSpec) -> O) -> Self {
        let files = ModelFiles::open(&source(name)).unwrap();
        let spec = ModelSpec::load(&files).unwrap();
        let checkpoint = Checkpoint::open(&files).unwrap();
        let kv = spec.kv_shape(NUM_BLOCKS, BLOCK_SIZE, DType::Bf16);
        let limits = DecoderLimits { max_num_batched_tokens: MAX_LEN, max_model_len: MAX_LEN };
        let mut decoder = Decoder::load(ops(&spec), &spec, &checkpoint, limits, |_| ()).unwrap();
        decoder.allocate_kv(kv).unwrap();
        Self { decoder, vocab: spec.vocab_size }
    }

    /// Computes `tokens` at positions from `start` on and gives the logits of the last `wanted`.
    fn run(&mut self, start: usize, tokens: &[u32], wanted: usize) -> Vec<Vec<f32>> {
        let logits_indices = (tokens.len() - wanted..tokens.len()).map(|t| t as u32).collect();
        let meta = BatchMeta { logits_indices, ..Self::meta(start, tokens) };
        let logits = self.decoder.logits(Arc::new(meta)).unwrap();
        logits.chunks_exact(self.vocab).map(<[f32]>::to_vec).collect()
    }

    /// The same, and gives the hidden states of all of them, beside the log-probability of a token at the last.
    fn states(&mut self, start: usize, tokens: &[u32]) -> Vec<f32> {
        let (logits_indices, state_indices) =
            (vec![tokens.len() as u32 - 1], (0..tokens.len() as u32).collect());
        let meta = BatchMeta { logits_indices, state_indices, ..Self::meta(start, tokens) };
        let pending = self.decoder.launch(Arc::new(meta), [RowTask::Score(7, 0)].into()).unwrap();
        let results = self.decoder.wait(pending).unwrap();
        assert!(results.sampled.len() == 1 && results.sampled[0].finite);
        results.states
    }

    fn meta(start: usize, tokens: &[u32]) -> BatchMeta {
        let blocks: Vec<u32> = (0..NUM_BLOCKS as u32).map(|i| (i * 7 + 3) % NUM_BLOCKS as u32).collect();
        let end = start + tokens.len();
        let slot = |p: usize| blocks[p / BLOCK_SIZE] * BLOCK_SIZE as u32 + (p % BLOCK_SIZE) as u32;
        BatchMeta {
            token_ids: tokens.to_vec(),
            positions: (start..end).map(|p| p as u32).collect(),
            slot_mapping: (start..end).map(slot).collect(),
            cu_seqlens_q: vec![0, tokens.len() as u32],
            context_lens: vec![end as u32],
            block_tables: blocks.clone(),
            max_blocks: blocks.len(),
            ..BatchMeta::default()
        }
    }
}

fn cpu(name: &str) -> Model<CpuOps> {
    let config = CpuConfig { compute: Compute::Bf16, isa: None, threads: Some(2) };
    Model::load(name, |_| CpuOps::new(config).unwrap())
}

fn cuda(name: &str, schedule: Schedule) -> Model<CudaOps> {
    Model::load(name, |spec| {
        let config = CudaConfig {
            max_tokens: MAX_LEN,
            max_rows: 4,
            max_model_len: MAX_LEN,
            block_size: BLOCK_SIZE,
            attention: spec.cuda_attention(),
            vocab: spec.vocab_size,
            graphs: false,
        };
        CudaOps::new(Device::new(driver(schedule)), config).unwrap()
    })
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap() as u32
}

/// `near_tie`: margin between two logits, as a share of their range, below which either may be the greedy token.
fn check(name: &str, schedule: Schedule, near_tie: f32) {
    let golden = golden(name);
    let prompts = golden.keys().filter(|key| key.starts_with("logits")).count();
    assert!(prompts >= 3, "{name}: too few prompts");
    for i in 0..prompts {
        let (mut cpu, mut cuda) = (cpu(name), cuda(name, schedule));
        let prompt = &golden[&format!("input_ids.{i}")];
        let expected: Vec<f32> =
            golden[&format!("logits.{i}")].iter().map(|&bits| f32::from_bits(bits)).collect();
        let compared = expected.len() / cuda.vocab;
        let got = cuda.run(0, prompt, compared);
        let difference = got.concat().iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let (low, high) = expected.iter().fold((f32::MAX, f32::MIN), |(l, h), &x| (l.min(x), h.max(x)));
        assert!(
            difference <= TOLERANCE * (high - low),
            "{name}, prompt {i}: logits differ by {difference} of {}",
            high - low
        );
        let (mut logits, mut reference) = (got.last().unwrap().clone(), cpu.run(0, prompt, 1).remove(0));
        for step in 0..golden[&format!("greedy_ids.{i}")].len() {
            let (token, expected) = (argmax(&logits), argmax(&reference));
            // Both round to bfloat16, at different places: where two tokens are that near, either may come first.
            let margin = reference[expected as usize] - reference[token as usize];
            assert!(
                margin <= near_tie * (high - low),
                "{name}, prompt {i}: greedy token {step} is {token}, the CPU's {expected} by a margin of {margin}"
            );
            let at = prompt.len() + step;
            (logits, reference) =
                (cuda.run(at, &[expected], 1).remove(0), cpu.run(at, &[expected], 1).remove(0));
        }
    }
}

#[test]
fn hidden_states_are_those_of_transformers_and_chunks_do_not_change_their_bits() {
    for name in ["llama", "llama_bias"] {
        let (golden, embeddings) = (golden(name), tensors(name, "embeddings.safetensors"));
        for (i, chunk) in [3, 16, 33].into_iter().enumerate() {
            let prompt = &golden[&format!("input_ids.{i}")];
            let whole = cuda(name, Schedule::all()[0]).states(0, prompt);
            let mut model = cuda(name, Schedule::all()[1]);
            let pieces = prompt.chunks(chunk).enumerate();
            let pieces: Vec<f32> = pieces.flat_map(|(at, piece)| model.states(at * chunk, piece)).collect();
            assert!(whole == pieces, "{name}: chunks of {chunk} tokens change the bits");
            let width = whole.len() / prompt.len();
            let mean = |h: usize| whole.iter().skip(h).step_by(width).sum::<f32>() / prompt.len() as f32;
            let last = &whole[whole.len() - width..];
            let mean: Vec<f32> = (0..width).map(mean).collect();
            let got = [last, &mean[..], &whole[..width]].concat();
            let expected: Vec<f32> =
                embeddings[&format!("embeddings.{i}")].iter().map(|&bits| f32::from_bits(bits)).collect();
            assert_eq!(got.len(), expected.len());
            let off = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let range = 2.0 * expected.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
            assert!(off <= TOLERANCE * range, "{name}, prompt {i}: off by {off} of {range}");
        }
    }
}

/// Dense families whose layers take other ways through the kernels than Llama's, and the share of their range that logits may differ.
const DENSE: [(&str, f32); 12] = [
    ("mistral", 0.02),
    ("smollm3", 0.02),
    ("qwen3", 0.04),
    ("gemma2", 0.04),
    ("gemma3", 0.04),
    ("phi3_longrope", 0.02),
    ("olmo2", 0.04),
    ("cohere", 0.04),
    ("falcon40b", 0.02),
    ("falcon_rw", 0.02),
    ("gpt2", 0.02),
    ("gpt_neox", 0.02),
];
const EXPERTS: [&str; 4] = ["qwen2_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"];

/// By how much the logits of each of the last tokens of a prompt of 33 differ from the reference, as a share of their range, in chunks.
fn differences(name: &str) -> Vec<f32> {
    let golden = golden(name);
    let prompt = &golden["input_ids.1"];
    let expected: Vec<f32> = golden["logits.1"].iter().map(|&bits| f32::from_bits(bits)).collect();
    let mut model = cuda(name, Schedule::all()[0]);
    let (low, high) = expected.iter().fold((f32::MAX, f32::MIN), |(l, h), &x| (l.min(x), h.max(x)));
    let rows: Vec<_> = expected.chunks_exact(model.vocab).collect();
    // The end of the prompt is a step of its own, so that it reads what the first one wrote; and its last token is decoded.
    let (first, last) = (prompt.len() - rows.len(), prompt.len() - 1);
    model.run(0, &prompt[..first], 1);
    let mut got = model.run(first, &prompt[first..last], rows.len() - 1);
    got.extend(model.run(last, &prompt[last..], 1));
    let off = |got: &[f32], expected: &[f32]| {
        let off = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        if got.iter().all(|x| x.is_finite()) { off / (high - low) } else { f32::INFINITY }
    };
    got.iter().zip(rows).map(|(got, expected)| off(got, expected)).collect()
}

fn print_golden(name: &str, error: f32) {
    let files = ModelFiles::open(&source(name)).unwrap();
    let of = ModelSpec::load(&files).unwrap().architecture;
    println!(
        r#"golden {{"fixture": "{name}", "architecture": "{of}", "device": "cuda", "max_error": {error:e}}}"#
    );
}

#[test]
fn dense_families_agree_with_transformers() {
    for (name, tolerance) in DENSE {
        let worst = differences(name).into_iter().fold(0.0, f32::max);
        assert!(worst <= tolerance, "{name}: logits differ by {worst} of their range");
        print_golden(name, worst);
    }
}

/// Rounding to bfloat16 sends a token now and then to another expert than float32 does, and then its logits say nothing.
#[test]
fn mixtures_of_experts_agree_with_transformers_for_most_tokens() {
    for name in EXPERTS {
        let mut all = differences(name);
        all.sort_by(f32::total_cmp);
        let median = all[all.len() / 2];
        assert!(all.iter().all(|off| off.is_finite()) && median <= 0.04, "{name}: {all:?}");
        print_golden(name, median);
    }
}

#[test]
fn tiny_models_agree_with_transformers_and_in_greedy_tokens_with_the_cpu() {
    for name in TINY {
        // Random weights: the logits are flat.
        check(name, Schedule::all()[0], 0.01);
        print_golden(name, TOLERANCE);
    }
}

#[test]
fn the_built_in_model_agrees_with_transformers_and_greedy_tokens_equal_the_cpu_s() {
    // Tensor cores round otherwise than the emulator does.
    let near_tie = if std::env::var_os("TIDEMILL_TEST_DEVICE").is_some() { 0.002 } else { 0.0 };
    check("demo", Schedule::all()[0], near_tie);
}
