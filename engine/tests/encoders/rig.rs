//! Engines over model folders without a tokenizer, in float32.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use safetensors::SafeTensors;
use tempfile::TempDir;
use tidemill_engine::{
    Engine, EngineHandle, EngineOptions, LoadError, ModelInfo,
    ids::TokenId,
    model::{
        Checkpoint, Decoder, DecoderLimits, GenerationDefaults, HeadSpec, ModelFiles, ModelSource, ModelSpec,
    },
    output::{Embedding, Score},
    request::{EmbedRequest, Prompt, ScoreInput, ScoreRequest},
    runner::{DecoderRunner, RunnerThread},
    text::TextModel,
};
use tidemill_kernels::{
    DType,
    cpu::{Compute, CpuConfig, CpuOps},
};

/// All fixtures of `scripts/golden_encoders.py`.
pub const MODELS: [&str; 8] = [
    "bert_minilm",
    "bert_cross",
    "xlmr_rerank",
    "modernbert",
    "modernbert_rerank",
    "qwen3_embed",
    "mistral_embed",
    "qwen3_rerank",
];
pub const TOLERANCE: f32 = 1e-4;
const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 24;
const MAX_MODEL_LEN: usize = 256;

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of a folder, to be changed.
pub fn copy(folder: &Path) -> TempDir {
    let dir = TempDir::new().unwrap();
    copy_into(folder, dir.path());
    dir
}

fn copy_into(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => {
                fs::create_dir(&target).unwrap();
                copy_into(&path, &target);
            }
            false => drop(fs::copy(&path, &target).unwrap()),
        }
    }
}

/// An engine over a folder, with so many tokens per step.
pub fn start(dir: &Path, max_num_batched_tokens: usize) -> Result<Engine, LoadError> {
    let files = ModelFiles::open(&ModelSource::Dir(dir.to_owned()))?;
    let mut spec = ModelSpec::load(&files)?;
    let heads = HeadSpec::read(&files, &spec, None)?;
    let checkpoint = Checkpoint::open(&files)?;
    spec.follow_names(|name| checkpoint.contains(name));
    checkpoint.verify(&spec)?;
    let max_model_len = MAX_MODEL_LEN.min(spec.max_position_embeddings);
    let info = ModelInfo {
        served_model_name: "tiny".into(),
        architecture: spec.architecture.into(),
        num_parameters: 0,
        weight_bytes_per_step: 0,
        vocab_size: spec.vocab_size,
        max_model_len,
        device: "cpu".into(),
        dtype: "float32",
        kv_cache_dtype: "float32",
        block_size: BLOCK_SIZE,
        num_kv_blocks: NUM_BLOCKS,
        max_num_seqs: 4,
        max_num_batched_tokens,
        eos_token_ids: Vec::new(),
        has_chat_template: false,
        defaults: GenerationDefaults::default(),
        is_bidirectional: spec.is_bidirectional(),
        embedding: heads.embedding,
        scoring: heads.scoring,
    };
    // Prompts are token ids: any tokenizer does.
    let builtin = ModelFiles::open(&ModelSource::Builtin)?;
    let text = TextModel::load(&builtin, &ModelSpec::load(&builtin)?)?;
    let options =
        EngineOptions { heads: heads.load(&files, &spec, &checkpoint, &text)?, ..EngineOptions::default() };
    let (runner, ()) = RunnerThread::start(move || {
        let ops = CpuOps::new(CpuConfig { compute: Compute::F32, isa: None, threads: Some(2) })?;
        let limits = DecoderLimits { max_num_batched_tokens, max_model_len };
        let mut decoder = Decoder::load(ops, &spec, &checkpoint, limits, |_| ())?;
        decoder.allocate_kv(spec.kv_shape(NUM_BLOCKS, BLOCK_SIZE, DType::F32))?;
        Ok((DecoderRunner::new(decoder, BLOCK_SIZE), ()))
    })?;
    Engine::with_runner(runner, info, Arc::new(text), options)
}

pub fn engine(name: &str) -> Engine {
    start(&fixture(name), 128).unwrap()
}

/// A prompt of a fixture, and what comes of it.
pub struct Golden {
    pub ids: Vec<TokenId>,
    pub segments: Vec<u32>,
    /// An embedding of length 1, or a score before any function.
    pub expected: Vec<f32>,
}

/// The prompts of a fixture.
pub fn goldens(name: &str) -> Vec<Golden> {
    let bytes = fs::read(fixture(name).join("golden.safetensors")).unwrap();
    let words =
        |data: &[u8]| data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let tensors: HashMap<String, Vec<u32>> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, tensor)| (name, words(tensor.data())))
        .collect();
    let golden = |i: usize| {
        let get = |what: &str| tensors.get(&format!("{what}.{i}"));
        let expected = get("embedding").or(get("score")).unwrap();
        Golden {
            ids: get("input_ids").unwrap().iter().map(|&id| TokenId(id)).collect(),
            segments: get("segments").cloned().unwrap_or_default(),
            expected: expected.iter().map(|&bits| f32::from_bits(bits)).collect(),
        }
    };
    (0..3).map(golden).collect()
}

/// What the engine makes of a prompt: an embedding, or a score before any function.
pub fn result(handle: &EngineHandle, golden: &Golden) -> Vec<f32> {
    pending(handle, golden)()
}

/// The same, under way.
pub fn pending(handle: &EngineHandle, golden: &Golden) -> Box<dyn FnOnce() -> Vec<f32>> {
    if handle.info().scoring.is_some() {
        let input = ScoreInput::TokenIds { ids: golden.ids.clone(), segments: golden.segments.clone() };
        let request = ScoreRequest { use_activation: Some(false), ..ScoreRequest::new(input) };
        let pending = handle.submit_score(handle.validate_score(request).unwrap()).unwrap();
        return Box::new(move || {
            let Score { value, .. } = pending.wait_blocking().unwrap();
            vec![value]
        });
    }
    let request = EmbedRequest::new(Prompt::TokenIds(golden.ids.clone()));
    let pending = handle.submit_embed(handle.validate_embed(request).unwrap()).unwrap();
    Box::new(move || {
        let Embedding { values, .. } = pending.wait_blocking().unwrap();
        values
    })
}

pub fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
