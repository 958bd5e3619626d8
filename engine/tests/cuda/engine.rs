//! The engine on CUDA kernels: concurrent requests, aborts, graphs, failures of the device, memory.

use std::sync::Arc;

use tidemill_engine::{
    DType, Engine, EngineConfig, ErrorCode, Generation, LoadError, PendingEmbedding,
    ids::TokenId,
    model::files::ModelSource,
    output::AbortStage,
    request::{EmbedRequest, GenerateRequest, Prompt},
    sampling::SamplingParams,
    structured::Structured,
};
use tidemill_kernels::{KernelError, cuda::driver::DeviceInfo};
use tidemill_kernels_emu::{EmuConfig, EmuDriver, Failure, Live, Schedule};

/// What is compared: tokens, and the bits of their log-probabilities.
type Outcome = (Vec<TokenId>, Vec<u32>);

fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: Some(4),
        max_num_batched_tokens: Some(48),
        max_model_len: Some(96),
        kv_cache_memory: Some(2 << 20),
        threads: Some(2),
        ..EngineConfig::new(ModelSource::Builtin)
    }
}

fn start(driver: &Arc<EmuDriver>, config: EngineConfig) -> Result<Engine, LoadError> {
    Engine::start_on(Some(driver.clone()), config, |_| ())
}

/// Requests of different lengths and kinds; the first is greedy.
fn request(index: usize, tokens: u32) -> GenerateRequest {
    let text = [
        "Once upon a time",
        "The lighthouse keeper found a small boat, and then it rained. Why?",
        "Hello",
        "A",
    ];
    let mut sampling = SamplingParams {
        temperature: Some([0.0, 0.8, 1.2, 0.7][index]),
        seed: Some(index as u64),
        max_tokens: Some(tokens),
        ignore_eos: true,
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    match index {
        1 => (sampling.top_k, sampling.top_p) = (Some(20), Some(0.9)),
        2 => (sampling.repetition_penalty, sampling.frequency_penalty) = (Some(1.2), Some(0.3)),
        3 => sampling.prompt_logprobs = Some(1),
        _ => {}
    }
    GenerateRequest { sampling, ..GenerateRequest::new(Prompt::Text(text[index].into())) }
}

fn submit(engine: &Engine, request: GenerateRequest) -> Generation {
    let handle = engine.handle();
    handle.submit(handle.validate(request).unwrap()).unwrap()
}

fn outcome(mut generation: Generation) -> Outcome {
    let mut outcome = Outcome::default();
    while let Some(output) = generation.next_blocking() {
        let output = output.unwrap();
        outcome.0.extend(output.token_ids);
        outcome.1.extend(output.logprobs.iter().flat_map(|l| [l.logprob.to_bits(), l.top[1].1.to_bits()]));
    }
    outcome
}

fn together(engine: &Engine, requests: impl IntoIterator<Item = GenerateRequest>) -> Vec<Outcome> {
    let generations: Vec<_> = requests.into_iter().map(|request| submit(engine, request)).collect();
    generations.into_iter().map(outcome).collect()
}

#[test]
fn concurrent_requests_give_the_tokens_of_the_cpu_and_leave_nothing_behind() {
    let driver = Arc::new(EmuDriver::new(Schedule::default()));
    let greedy = |index| {
        let mut request = request(index, 6);
        request.sampling = SamplingParams { temperature: Some(0.0), ..request.sampling };
        request
    };
    let cpu = Engine::start_on(None, config(), |_| ()).unwrap();
    let expected = together(&cpu, (0..4).map(greedy));
    let engine = start(&driver, config()).unwrap();
    assert!(engine.handle().info().device.starts_with("cuda (CUDA on CPU"));
    let got = together(&engine, (0..4).map(greedy));
    for (got, expected) in got.iter().zip(&expected) {
        assert_eq!(got.0, expected.0);
    }
    assert_eq!(engine.handle().stats().kv_blocks.owned, 0);
    drop(engine);
    assert_eq!(driver.live(), Live::default());
}

#[test]
fn alone_or_together_from_graphs_or_not_in_chunks_or_whole_the_bits_are_the_same() {
    let run = |config: EngineConfig, at_once: bool| {
        let engine = start(&Arc::new(EmuDriver::new(Schedule::all()[1])), config).unwrap();
        match at_once {
            true => together(&engine, (0..4).map(|index| request(index, 5))),
            false => (0..4).map(|index| outcome(submit(&engine, request(index, 5)))).collect(),
        }
    };
    let alone = run(config(), false);
    assert!(alone.iter().all(|(tokens, bits)| tokens.len() == 5 && bits.len() == 10));
    assert_eq!(run(config(), true), alone, "together");
    assert_eq!(run(EngineConfig { enforce_eager: true, ..config() }, true), alone, "without graphs");
    let chunks = EngineConfig { max_num_batched_tokens: Some(5), look_ahead: Some(false), ..config() };
    assert_eq!(run(chunks, true), alone, "in chunks of 5 tokens, one step at a time");
}

#[test]
fn embeddings_alone_or_beside_generations_have_the_same_bits_and_are_near_the_cpu_s() {
    let submit_embed = |engine: &Engine, index: usize| {
        let handle = engine.handle();
        let request = EmbedRequest::new(request(index, 1).prompt);
        handle.submit_embed(handle.validate_embed(request).unwrap()).unwrap()
    };
    let values = |pending: PendingEmbedding| pending.wait_blocking().unwrap().values;
    let alone =
        |engine: Engine| (0..4).map(|index| values(submit_embed(&engine, index))).collect::<Vec<Vec<f32>>>();
    let driver = Arc::new(EmuDriver::new(Schedule::default()));
    let expected = alone(start(&driver, config()).unwrap());
    let chunks = EngineConfig { max_num_batched_tokens: Some(5), ..config() };
    for config in [config(), EngineConfig { enforce_eager: true, ..config() }, chunks] {
        let engine = start(&driver, config).unwrap();
        let generations: Vec<_> = (0..2).map(|index| submit(&engine, request(index, 8))).collect();
        let pending: Vec<_> = (0..4).map(|index| submit_embed(&engine, index)).collect();
        assert!(pending.into_iter().map(values).collect::<Vec<_>>() == expected);
        generations.into_iter().for_each(|generation| drop(outcome(generation)));
        assert_eq!(engine.handle().stats().kv_blocks.owned, 0);
    }
    assert_eq!(driver.live(), Live::default());
    for (cuda, cpu) in expected.iter().zip(alone(Engine::start_on(None, config(), |_| ()).unwrap())) {
        let cosine: f32 = cuda.iter().zip(&cpu).map(|(a, b)| a * b).sum();
        assert!(cosine > 0.999, "{cosine}");
    }
}

#[test]
fn an_abort_frees_its_blocks_and_the_next_request_is_served() {
    let driver = Arc::new(EmuDriver::new(Schedule::default()));
    let engine = start(&driver, config()).unwrap();
    let handle = engine.handle();
    let mut long = submit(&engine, request(0, 64));
    long.next_blocking().unwrap().unwrap();
    let receipt = handle.abort_blocking(long.id().clone()).unwrap();
    assert_eq!(receipt.stage, AbortStage::Decode);
    assert!(receipt.blocks_freed > 0 && receipt.rows_freed == 1);
    assert_eq!(handle.stats().kv_blocks.free, handle.stats().kv_blocks.total);
    assert_eq!(outcome(submit(&engine, request(1, 3))).0.len(), 3);
}

#[test]
fn a_launch_that_is_refused_once_costs_nobody_a_token() {
    const TOKENS: u32 = 24;
    let driver = Arc::new(EmuDriver::new(Schedule::default()));
    // Without graphs every kernel of a step is a launch that can be refused.
    let engine = start(&driver, EngineConfig { enforce_eager: true, ..config() }).unwrap();
    let expected = together(&engine, (0..2).map(|index| request(index, TOKENS)));
    let mut generations: Vec<_> = (0..2).map(|index| submit(&engine, request(index, TOKENS))).collect();
    // From each its first token: from then on both share every step. A row that fails alone is lost.
    let firsts: Vec<_> = generations.iter_mut().map(|g| g.next_blocking().unwrap().unwrap()).collect();
    driver.fail_launch(0, Failure::Refused);
    for ((first, rest), expected) in firsts.into_iter().zip(generations).zip(expected) {
        assert_eq!([first.token_ids, outcome(rest).0].concat(), expected.0);
    }
}

#[test]
fn a_lost_device_ends_every_request_and_no_new_one_is_taken() {
    for failure in [Failure::Lost, Failure::Faults] {
        let driver = Arc::new(EmuDriver::new(Schedule::default()));
        let engine = start(&driver, config()).unwrap();
        let handle = engine.handle();
        let generations: Vec<_> = (0..2).map(|index| submit(&engine, request(index, 30))).collect();
        driver.fail_launch(3, failure);
        for mut generation in generations {
            let error = std::iter::from_fn(|| generation.next_blocking()).find_map(Result::err).unwrap();
            assert_eq!(error.code(), ErrorCode::DeviceLost, "{failure:?}: {error}");
        }
        // One that comes in the very moment is taken and told the same.
        let refused = match handle.submit(handle.validate(request(0, 3)).unwrap()) {
            Ok(mut generation) => generation.next_blocking().unwrap().map(drop).unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(refused.code(), ErrorCode::DeviceLost, "{failure:?}");
    }
}

fn sized(total_memory: usize) -> Arc<EmuDriver> {
    let config = EmuConfig::default();
    Arc::new(EmuDriver::with(EmuConfig {
        info: DeviceInfo { total_memory, ..config.info.clone() },
        ..config
    }))
}

#[test]
fn the_kv_cache_takes_what_the_share_of_memory_leaves() {
    const TOTAL: usize = 128 << 20;
    let blocks = |share| {
        let driver = sized(TOTAL);
        let config = EngineConfig {
            kv_cache_memory: None,
            gpu_memory_utilization: share,
            // So many that they never fit.
            max_num_seqs: Some(256),
            max_num_batched_tokens: Some(256),
            max_model_len: None,
            enforce_eager: true,
            ..config()
        };
        let engine = start(&driver, config).unwrap();
        let used = driver.live().device_bytes;
        assert!(used <= (TOTAL as f64 * share) as usize, "{used} bytes for a share of {share}");
        engine.handle().info().num_kv_blocks
    };
    let (small, large) = (blocks(0.8), blocks(0.9));
    // One block: 4 layers, keys and values, 16 tokens, 2 heads of 64 in bfloat16.
    let expected = (TOTAL as f64 * 0.1) as usize / (4 * 2 * 16 * 2 * 64 * 2);
    assert!((large - small).abs_diff(expected) <= 2, "{small} {large} {expected}");
}

#[test]
fn what_a_gpu_cannot_do_is_refused_with_what_to_do_instead() {
    let refusal = |driver: &Arc<EmuDriver>, config| {
        let error = start(driver, config).map(drop).unwrap_err();
        assert_eq!(driver.live(), Live::default(), "{error}");
        error
    };
    let driver = sized(1 << 30);
    for (config, option) in [
        (EngineConfig { dtype: tidemill_engine::ComputeDtype::F32, ..config() }, "--dtype"),
        (EngineConfig { kv_cache_dtype: Some(DType::F32), ..config() }, "--kv-cache-dtype"),
        (EngineConfig { block_size: 24, ..config() }, "--block-size"),
        (EngineConfig { kv_cache_memory: Some(100), ..config() }, "--kv-cache-memory"),
        (EngineConfig { kv_cache_memory: Some(1 << 16), ..config() }, "--max-model-len"),
        (
            EngineConfig { kv_cache_memory: None, gpu_memory_utilization: 0.001, ..config() },
            "--gpu-memory-utilization",
        ),
    ] {
        match refusal(&driver, config) {
            LoadError::Option { option: named, .. } => assert_eq!(named, option),
            other => panic!("{option}: {other}"),
        }
    }
    let error = refusal(&sized(8 << 20), config());
    assert!(matches!(error, LoadError::Kernel(KernelError::OutOfMemory { .. })), "{error}");
}

#[test]
fn answers_of_a_given_form_are_those_of_the_cpu_on_graphs_too() {
    let form = |index: usize| {
        let texts =
            ["[a-z]{2,9}( [a-z]{2,9}){2}", "(red|green|blue){1,3}", "\\{\"name\": \"[A-Z][a-z]+\"\\}"];
        let mut request = request(index, 14);
        (request.sampling.ignore_eos, request.sampling.logprobs) = (false, (index == 1).then_some(2));
        request.structured = Some(Structured::Regex(texts[index].into()));
        request
    };
    // One is free, and has the tokens that it has alone.
    let requests = || [form(0), form(1), request(3, 14), form(2)];
    let cpu = Engine::start(config(), |_| ()).unwrap();
    let expected: Vec<Outcome> =
        requests().into_iter().map(|request| outcome(submit(&cpu, request))).collect();
    let driver = Arc::new(EmuDriver::new(Schedule::default()));
    let engine = start(&driver, config()).unwrap();
    let tokens = |outcomes: &[Outcome]| outcomes.iter().map(|outcome| outcome.0.clone()).collect::<Vec<_>>();
    assert_eq!(tokens(&together(&engine, requests())), tokens(&expected));
    let recorded = driver.live().graphs;
    let alone: Vec<Outcome> =
        requests().into_iter().map(|request| outcome(submit(&engine, request))).collect();
    assert_eq!(tokens(&alone), tokens(&expected));
    assert!(driver.live().graphs > recorded, "a step of one row with a mask has a graph of its own");
}
