//! The same prompt has the same embedding, bit for bit: alone or among others, however it is cut into chunks, after preemption, with or
//! without cached prefixes, planned ahead or not. On the weights of the built-in model, with every pooling.

use tempfile::TempDir;
use tidemill_engine::{
    Engine, EngineConfig, EngineHandle, Generation, PendingEmbedding, Pooling,
    model::ModelSource,
    request::{EmbedRequest, GenerateRequest, Prompt},
    sampling::SamplingParams,
};

use crate::{folder, here, length};

const POOLINGS: [Pooling; 3] = [Pooling::Last, Pooling::Mean, Pooling::Cls];
const COUNT: usize = 16;

/// Values as bits, and tokens from the prefix cache.
type Outcome = (Vec<u32>, usize);

fn engine(
    dir: &TempDir,
    max_num_batched_tokens: usize,
    kv_blocks: Option<usize>,
    look_ahead: bool,
) -> Engine {
    // One block of 16 tokens: 4 layers, keys and values, 2 heads of 64, bfloat16.
    let block_bytes = 2 * 4 * 16 * 2 * 64 * 2;
    let config = EngineConfig {
        max_num_batched_tokens: Some(max_num_batched_tokens),
        kv_cache_memory: kv_blocks.map(|blocks| blocks * block_bytes),
        threads: Some(2),
        device: tidemill_engine::DeviceChoice::Cpu,
        look_ahead: Some(look_ahead),
        ..EngineConfig::new(ModelSource::Dir(dir.path().to_owned()))
    };
    Engine::start(config, |_| ()).unwrap()
}

fn text(index: usize) -> String {
    let words = ["The lighthouse", " keeper", " found a", " small", " boat,", " and then", " it", " rained."];
    let length = [1, 5, 17, 40, 110][index % 5];
    (0..length).map(|i| words[(i * 5 + index) % words.len()]).collect()
}

fn embed(handle: &EngineHandle, index: usize) -> PendingEmbedding {
    let request = EmbedRequest::new(Prompt::Text(text(index)));
    handle.submit_embed(handle.validate_embed(request).unwrap()).unwrap()
}

fn generate(handle: &EngineHandle, index: usize) -> Generation {
    let sampling = SamplingParams {
        temperature: Some(0.7),
        seed: Some(index as u64),
        max_tokens: Some(40),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let request = GenerateRequest { sampling, ..GenerateRequest::new(Prompt::Text(text(index + 3))) };
    handle.submit(handle.validate(request).unwrap()).unwrap()
}

fn outcome(pending: PendingEmbedding) -> Outcome {
    let embedding = pending.wait_blocking().unwrap();
    assert!((length(&embedding.values) - 1.0).abs() < 1e-6, "the folder asks for length 1");
    (embedding.values.iter().map(|x| x.to_bits()).collect(), embedding.cached_tokens)
}

fn alone(engine: &Engine) -> Vec<Outcome> {
    (0..COUNT).map(|index| outcome(embed(&engine.handle(), index))).collect()
}

/// Each behind a generation, all at once.
fn together(engine: &Engine) -> Vec<Outcome> {
    let handle = engine.handle();
    let both: Vec<_> = (0..COUNT).map(|index| (generate(&handle, index), embed(&handle, index))).collect();
    let finish = |(mut generation, pending): (Generation, _)| {
        let outcome = outcome(pending);
        while let Some(output) = generation.next_blocking() {
            output.unwrap();
        }
        outcome
    };
    both.into_iter().map(finish).collect()
}

fn values(outcomes: &[Outcome]) -> Vec<&Vec<u32>> {
    outcomes.iter().map(|(values, _)| values).collect()
}

#[test]
fn alone_among_others_chunked_preempted_planned_ahead_or_cached_the_bits_are_the_same() {
    let mut preemptions = 0;
    for pooling in POOLINGS {
        let dir = folder(&here("assets/demo"), pooling, true);
        let cold = engine(&dir, 512, None, false);
        let reference = alone(&cold);
        let again = alone(&cold);
        assert!(values(&again) == values(&reference), "{pooling:?}: with the blocks of the first run");
        let cached: usize = again.iter().map(|(_, cached)| cached).sum();
        assert_eq!(cached > 0, pooling == Pooling::Last, "{pooling:?} needs the states of {cached} tokens");
        for (budget, kv_blocks, look_ahead) in
            [(2048, None, true), (16, None, true), (64, Some(24), false), (16, Some(24), true)]
        {
            let engine = engine(&dir, budget, kv_blocks, look_ahead);
            let outcomes = together(&engine);
            for (index, (got, expected)) in values(&outcomes).iter().zip(values(&reference)).enumerate() {
                assert!(
                    *got == expected,
                    "{pooling:?} of prompt {index} differs with budget {budget}, blocks {kv_blocks:?}, look-ahead {look_ahead}"
                );
            }
            let stats = engine.handle().stats();
            assert_eq!(stats.kv_blocks.owned, 0);
            preemptions += stats.counters.preemptions;
        }
    }
    assert!(preemptions > 0, "a small cache preempts");
}
