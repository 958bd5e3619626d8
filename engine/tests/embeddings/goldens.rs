//! Embeddings of tiny models against transformers in float32, from what `scripts/make_goldens.py` computed: through the whole engine,
//! with the pooling that the folder asks for, in prompts cut into chunks.

use std::{collections::HashMap, fs, path::Path, sync::Arc};

use safetensors::SafeTensors;
use tidemill_engine::{
    Engine, EngineHandle, EngineOptions, ErrorCode, ModelInfo, Pooling,
    ids::TokenId,
    model::{
        Checkpoint, Decoder, DecoderLimits, GenerationDefaults, ModelFiles, ModelSource, ModelSpec,
        embedding_info,
    },
    request::{EmbedRequest, GenerateRequest, Prompt},
    runner::{DecoderRunner, RunnerThread},
    text::TextModel,
};
use tidemill_kernels::{
    DType,
    cpu::{Compute, CpuConfig, CpuOps},
};

use crate::{folder, here, length};

const TINY: [&str; 5] = ["llama", "llama3_rope", "llama_bias", "llama_linear", "llama_yarn"];
/// In the order of the golden tensors' rows.
const POOLINGS: [Pooling; 3] = [Pooling::Last, Pooling::Mean, Pooling::Cls];
const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 16;
const TOLERANCE: f32 = 1e-4;

/// Tensors as bits.
fn tensors(path: &Path) -> HashMap<String, Vec<u32>> {
    let bytes = fs::read(path).unwrap();
    let words =
        |data: &[u8]| data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    tensors.into_iter().map(|(name, tensor)| (name, words(tensor.data()))).collect()
}

/// An engine over a model without a tokenizer, in float32.
fn engine(dir: &Path, max_num_batched_tokens: usize) -> Engine {
    let files = ModelFiles::open(&ModelSource::Dir(dir.to_owned())).unwrap();
    let spec = ModelSpec::load(&files).unwrap();
    let embedding = embedding_info(&files, &spec).unwrap();
    let checkpoint = Checkpoint::open(&files).unwrap();
    let max_model_len = NUM_BLOCKS * BLOCK_SIZE;
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
        is_bidirectional: false,
        embedding,
        scoring: None,
    };
    let (runner, ()) = RunnerThread::start(move || {
        let ops = CpuOps::new(CpuConfig { compute: Compute::F32, isa: None, threads: Some(2) })?;
        let limits = DecoderLimits { max_num_batched_tokens, max_model_len };
        let mut decoder = Decoder::load(ops, &spec, &checkpoint, limits, |_| ())?;
        decoder.allocate_kv(spec.kv_shape(NUM_BLOCKS, BLOCK_SIZE, DType::F32))?;
        Ok((DecoderRunner::new(decoder, BLOCK_SIZE), ()))
    })
    .unwrap();
    // Prompts are token ids: any tokenizer does.
    let builtin = ModelFiles::open(&ModelSource::Builtin).unwrap();
    let text = TextModel::load(&builtin, &ModelSpec::load(&builtin).unwrap()).unwrap();
    Engine::with_runner(runner, info, Arc::new(text), EngineOptions::default()).unwrap()
}

fn embed(handle: &EngineHandle, request: EmbedRequest) -> Vec<f32> {
    handle.submit_embed(handle.validate_embed(request).unwrap()).unwrap().wait_blocking().unwrap().values
}

/// The same weights as sentence-transformers saves them: without an output layer, and without the prefix that would tell it apart.
fn behead(dir: &Path) {
    let (weights, config) = (dir.join("model.safetensors"), dir.join("config.json"));
    let bytes = fs::read(&weights).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let kept = tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("model.")?, tensor)));
    let saved = safetensors::serialize(kept, None).unwrap();
    fs::write(&weights, saved).unwrap();
    let text = fs::read_to_string(&config).unwrap().replace("LlamaForCausalLM", "LlamaModel");
    fs::write(&config, text).unwrap();
}

#[test]
fn a_model_without_an_output_layer_gives_the_same_embeddings_and_generates_nothing() {
    let fixture = here("tests/fixtures/llama");
    let [whole, beheaded] = [(); 2].map(|()| folder(&fixture, Pooling::Mean, true));
    behead(beheaded.path());
    let prompt = Prompt::TokenIds((5..40).map(TokenId).collect());
    let [expected, got] = [&whole, &beheaded].map(|dir| {
        let engine = engine(dir.path(), 256);
        embed(&engine.handle(), EmbedRequest::new(prompt.clone()))
    });
    assert!(got == expected && (length(&got) - 1.0).abs() < 1e-6);
    let engine = engine(beheaded.path(), 256);
    assert!(engine.handle().info().embedding.is_only_output);
    let error = engine.handle().validate(GenerateRequest::new(prompt)).unwrap_err();
    assert_eq!(error.code(), ErrorCode::FailedPrecondition);
    assert!(error.to_string().contains("no output layer"), "{error}");
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn every_pooling_equals_transformers_whole_or_in_chunks() {
    for name in TINY {
        let fixture = here("tests/fixtures").join(name);
        let prompts = tensors(&fixture.join("golden.safetensors"));
        let golden = tensors(&fixture.join("embeddings.safetensors"));
        assert_eq!(golden.len(), 3, "{name}: an embedding for each prompt");
        for (row, pooling) in POOLINGS.into_iter().enumerate() {
            let dir = folder(&fixture, pooling, false);
            // The longest prompt has 64 tokens.
            let engines = [256, 7].map(|max_num_batched_tokens| engine(dir.path(), max_num_batched_tokens));
            for i in 0..golden.len() {
                let ids = prompts[&format!("input_ids.{i}")].iter().map(|&id| TokenId(id)).collect();
                let all: Vec<f32> =
                    golden[&format!("embeddings.{i}")].iter().map(|&bits| f32::from_bits(bits)).collect();
                let expected = &all[row * all.len() / 3..(row + 1) * all.len() / 3];
                let request = EmbedRequest::new(Prompt::TokenIds(ids));
                let [whole, chunked] = [0, 1].map(|at| embed(&engines[at].handle(), request.clone()));
                let off = difference(&whole, expected);
                assert!(off <= TOLERANCE, "{name}, {pooling:?}, prompt {i}: off by {off}");
                assert!(whole == chunked, "{name}, {pooling:?}, prompt {i}: chunks change the bits");
                let handle = engines[0].handle();
                let unit = embed(&handle, EmbedRequest { normalize: Some(true), ..request.clone() });
                let norm = length(expected) as f32;
                let expected: Vec<f32> = expected.iter().map(|x| x / norm).collect();
                assert!(difference(&unit, &expected) <= TOLERANCE, "{name}, {pooling:?}, prompt {i}");
                let cut = embed(&handle, EmbedRequest { dimensions: Some(5), ..request });
                assert_eq!(cut, whole[..5], "the first values, and no more");
            }
        }
    }
}
