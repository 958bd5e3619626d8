//! The promise: the same request gives the same tokens, whoever shares the batch, however its prompt is cut, after preemption, and
//! whether or not a step is planned before the tokens of the one before are known.
//!
//! Compared are tokens and the bits of their log-probabilities, on the built-in model.

#![allow(clippy::unwrap_used)]

use tidemill_engine::{
    DeviceChoice, Engine, EngineConfig, EngineHandle, Generation,
    ids::TokenId,
    model::files::ModelSource,
    request::{GenerateRequest, Prompt},
    sampling::SamplingParams,
};

/// What is compared: tokens, bits of their log-probabilities, text, bits of the prompt's log-probabilities.
type Outcome = (Vec<TokenId>, Vec<u32>, String, Vec<u32>);

fn engine(max_num_batched_tokens: usize, kv_blocks: Option<usize>, look_ahead: bool) -> Engine {
    start(max_num_batched_tokens, kv_blocks, look_ahead, 0)
}

fn start(
    max_num_batched_tokens: usize,
    kv_blocks: Option<usize>,
    look_ahead: bool,
    host_blocks: usize,
) -> Engine {
    // One block of 16 tokens: 4 layers, keys and values, 2 heads of 64, bfloat16.
    let block_bytes = 2 * 4 * 16 * 2 * 64 * 2;
    let config = EngineConfig {
        swap_space: host_blocks * block_bytes,
        max_num_batched_tokens: Some(max_num_batched_tokens),
        kv_cache_memory: kv_blocks.map(|blocks| blocks * block_bytes),
        threads: Some(2),
        device: device(),
        look_ahead: Some(look_ahead),
        ..EngineConfig::new(ModelSource::Builtin)
    };
    Engine::start(config, |_| ()).unwrap()
}

/// The CPU, or the GPU that `TIDEMILL_TEST_DEVICE=cuda:N` names.
fn device() -> DeviceChoice {
    let Ok(name) = std::env::var("TIDEMILL_TEST_DEVICE") else { return DeviceChoice::Cpu };
    let ordinal = name.strip_prefix("cuda:").and_then(|n| n.parse().ok());
    DeviceChoice::Cuda(ordinal.unwrap_or_else(|| panic!("TIDEMILL_TEST_DEVICE is {name:?}, not cuda:N")))
}

/// Requests of many lengths and all kinds of sampling.
fn request(index: u32) -> GenerateRequest {
    let words = [
        "The lighthouse",
        " keeper",
        " found a",
        " small",
        " boat,",
        " and then",
        " it",
        " rained.",
        " Why?",
    ];
    let length = [1, 3, 9, 17, 40, 90][index as usize % 6];
    let text: String = (0..length).map(|i| words[(i * 5 + index as usize) % words.len()]).collect();
    let mut sampling = SamplingParams {
        temperature: Some([0.0, 0.7, 1.3][index as usize % 3]),
        seed: Some(u64::from(index)),
        max_tokens: Some(8 + index * 7 % 40),
        ignore_eos: true,
        logprobs: Some(2),
        // With a long prompt these are more rows of logits than are computed at a time.
        prompt_logprobs: (index % 5 == 4).then_some(0),
        ..SamplingParams::default()
    };
    match index % 4 {
        1 => (sampling.top_k, sampling.top_p) = (Some(20), Some(0.9)),
        2 => (sampling.repetition_penalty, sampling.frequency_penalty) = (Some(1.2), Some(0.3)),
        3 => sampling.min_p = Some(0.05),
        _ => {}
    }
    GenerateRequest { sampling, ..GenerateRequest::new(Prompt::Text(text)) }
}

fn submit(handle: &EngineHandle, index: u32) -> Generation {
    handle.submit(handle.validate(request(index)).unwrap()).unwrap()
}

fn outcome(mut generation: Generation) -> Outcome {
    let mut outcome = Outcome::default();
    while let Some(output) = generation.next_blocking() {
        let output = output.unwrap();
        outcome.0.extend(output.token_ids);
        outcome.1.extend(output.logprobs.iter().flat_map(|l| [l.logprob.to_bits(), l.top[1].1.to_bits()]));
        outcome.2 += &output.text;
        outcome.3.extend(output.prompt_logprobs.iter().map(|l| l.logprob.to_bits()));
    }
    outcome
}

fn alone(engine: &Engine, count: u32) -> Vec<Outcome> {
    (0..count).map(|index| outcome(submit(&engine.handle(), index))).collect()
}

fn together(engine: &Engine, count: u32) -> Vec<Outcome> {
    let generations: Vec<_> = (0..count).map(|index| submit(&engine.handle(), index)).collect();
    generations.into_iter().map(outcome).collect()
}

#[test]
fn alone_or_among_32_chunked_preempted_or_planned_ahead_the_bits_are_the_same() {
    const COUNT: u32 = 33;
    let reference = alone(&engine(512, None, false), COUNT);
    assert!(reference.iter().all(|(tokens, bits, ..)| !tokens.is_empty() && bits.len() == 2 * tokens.len()));
    assert!(reference.iter().any(|(.., prompt)| prompt.len() > 64), "more than one group of logits");
    assert!(alone(&engine(512, None, true), COUNT) == reference, "alone, but planned ahead");
    let mut preempted = 0;
    for (budget, kv_blocks, look_ahead) in [
        (16, None, true),
        (2048, None, true),
        (512, Some(24), false),
        (512, Some(24), true),
        (16, Some(24), true),
    ] {
        let engine = engine(budget, kv_blocks, look_ahead);
        let outcomes = together(&engine, COUNT);
        for (index, (got, expected)) in outcomes.iter().zip(&reference).enumerate() {
            assert!(
                got == expected,
                "request {index} differs with budget {budget}, blocks {kv_blocks:?}, look-ahead {look_ahead}: {got:?} {expected:?}"
            );
        }
        let stats = engine.handle().stats();
        assert_eq!(stats.kv_blocks.owned, 0);
        let preemptions = stats.counters.preemptions;
        assert!(kv_blocks.is_some() || preemptions == 0, "there is room for all");
        preempted += preemptions;
    }
    // On a fast device the first requests may end before the last arrive.
    assert!(preempted > 0 || device() != DeviceChoice::Cpu, "a small cache preempts");
}

#[test]
fn found_in_the_prefix_cache_or_brought_back_from_the_host_the_bits_are_the_same() {
    const COUNT: u32 = 33;
    let cold = start(512, None, true, 0);
    let reference = alone(&cold, COUNT);
    let again = together(&cold, COUNT);
    assert!(again == reference, "with the blocks of the first run");
    let counters = cold.handle().stats().counters;
    // Every other request wants log-probabilities of its prompt, and so reads it.
    assert!(counters.prefix_cache_hits > 300, "{counters:?}");
    let swapping = start(512, Some(24), true, 64);
    for run in 0..2 {
        assert!(together(&swapping, COUNT) == reference, "run {run} with blocks on the host");
    }
    let counters = swapping.handle().stats().counters;
    let swapped = counters.blocks_saved > 0 && counters.blocks_loaded > 0;
    // A GPU may find that copies do not pay for so small a model.
    assert!(swapped || device() != DeviceChoice::Cpu, "{counters:?}");
    assert_eq!(swapping.handle().stats().kv_blocks.owned, 0);
}
