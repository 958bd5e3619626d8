//! Adapters of a running engine, on the built-in model: chosen by name, mixed, swapped, loaded and unloaded under traffic.

use std::path::Path;

use tidemill_engine::{
    DeviceChoice, Engine, EngineConfig, EngineHandle, ErrorCode, Generation, LoraConfig, RequestError,
    ids::TokenId,
    model::files::ModelSource,
    request::{EmbedRequest, GenerateRequest, Prompt},
    sampling::SamplingParams,
};

use crate::{adapter, fixtures};

const NAMES: [Option<&str>; 3] = [None, Some("a"), Some("b")];

fn engine(max_loras: usize, look_ahead: bool) -> Engine {
    let lora = LoraConfig {
        max_loras,
        max_lora_rank: 4,
        max_cpu_loras: 3,
        modules: ["a", "b"].map(|name| (name.to_owned(), adapter(&format!("demo_{name}")))).into(),
        dir: Some(fixtures()),
    };
    let config = EngineConfig {
        max_num_batched_tokens: Some(64),
        max_num_seqs: Some(6),
        // 64 blocks of 16 tokens.
        kv_cache_memory: Some(64 * 2 * 4 * 16 * 2 * 64 * 2),
        threads: Some(2),
        device: DeviceChoice::Cpu,
        look_ahead: Some(look_ahead),
        lora: Some(lora),
        ..EngineConfig::new(ModelSource::Builtin)
    };
    Engine::start(config, |_| ()).unwrap()
}

fn request(model: Option<&str>, index: u32) -> GenerateRequest {
    let words = ["The lighthouse", " keeper", " found a", " small", " boat,", " and then", " it rained."];
    let length = [2, 40, 9, 70][index as usize % 4];
    let text: String = (0..length).map(|i| words[(i * 5 + index as usize) % words.len()]).collect();
    let sampling = SamplingParams {
        temperature: Some([0.0, 0.9][index as usize % 2]),
        seed: Some(u64::from(index)),
        max_tokens: Some(5 + index * 7 % 20),
        ignore_eos: true,
        logprobs: Some(1),
        ..SamplingParams::default()
    };
    GenerateRequest { sampling, model: model.map(str::to_owned), ..GenerateRequest::new(Prompt::Text(text)) }
}

fn submit(handle: &EngineHandle, model: Option<&str>, index: u32) -> Generation {
    handle.submit(handle.validate(request(model, index)).unwrap()).unwrap()
}

/// Tokens, bits of their log-probabilities, and what was found in the prefix cache.
fn outcome(mut generation: Generation) -> (Vec<TokenId>, Vec<u32>, u32) {
    let (mut tokens, mut bits, mut cached) = (Vec::new(), Vec::new(), 0);
    while let Some(output) = generation.next_blocking() {
        let output = output.unwrap();
        tokens.extend(output.token_ids);
        bits.extend(output.logprobs.iter().map(|l| l.logprob.to_bits()));
        if let Some(finish) = output.finish {
            cached = finish.usage.cached_tokens as u32;
        }
    }
    (tokens, bits, cached)
}

fn same(got: (Vec<TokenId>, Vec<u32>, u32), expected: &(Vec<TokenId>, Vec<u32>, u32), what: &str) {
    assert_eq!((&got.0, &got.1), (&expected.0, &expected.1), "{what}");
}

#[test]
fn requests_of_two_adapters_and_of_none_get_what_they_get_alone_with_one_slot_or_two() {
    const COUNT: u32 = 24;
    let model = |index: u32| NAMES[index as usize * 7 % 3];
    let reference: Vec<_> = {
        let engine = engine(2, false);
        (0..COUNT).map(|index| outcome(submit(&engine.handle(), model(index), index))).collect()
    };
    let plain = {
        let engine = engine(1, false);
        let base: Vec<_> = (0..COUNT).map(|index| outcome(submit(&engine.handle(), None, index))).collect();
        base
    };
    for index in 0..COUNT as usize {
        let is_base = model(index as u32).is_none();
        assert_eq!(
            reference[index].1 == plain[index].1,
            is_base,
            "request {index}: an adapter changes something"
        );
    }
    for (max_loras, look_ahead) in [(1, false), (1, true), (2, true)] {
        let engine = engine(max_loras, look_ahead);
        let handle = engine.handle();
        for round in 0..2 {
            let generations: Vec<_> = (0..COUNT).map(|index| submit(&handle, model(index), index)).collect();
            for (index, generation) in generations.into_iter().enumerate() {
                let what =
                    format!("request {index}, {max_loras} slots, look-ahead {look_ahead}, round {round}");
                same(outcome(generation), &reference[index], &what);
            }
        }
        assert_eq!(handle.stats().kv_blocks.owned, 0);
        assert!(handle.stats().counters.prefix_cache_hits > 0);
    }
}

#[test]
fn no_cached_prefix_is_shared_between_adapters_or_with_one_that_was_loaded_again() {
    let engine = engine(2, false);
    let handle = engine.handle();
    let cached = |model| outcome(submit(&handle, model, 1)).2;
    for model in NAMES {
        assert_eq!(cached(model), 0, "{model:?} shares with nobody");
        assert!(cached(model) >= 16, "{model:?} shares with itself");
    }
    handle.adapters().unload("a").unwrap();
    handle.adapters().load("a", "lora/demo_b").unwrap();
    assert_eq!(cached(Some("a")), 0, "under the name of one that went");
    let other = outcome(submit(&handle, Some("b"), 1));
    same(outcome(submit(&handle, Some("a"), 1)), &other, "the same files under another name");
}

#[test]
fn an_adapter_that_is_unloaded_serves_whoever_named_it_before_and_nobody_after() {
    let engine = engine(1, true);
    let handle = engine.handle();
    let expected: Vec<_> = (0..6).map(|index| outcome(submit(&handle, Some("a"), index))).collect();
    let running: Vec<_> = (0..6).map(|index| submit(&handle, Some("a"), index)).collect();
    let validated = handle.validate(request(Some("a"), 0)).unwrap();
    handle.adapters().unload("a").unwrap();
    let after = handle.validate(request(Some("a"), 0)).expect_err("it is gone");
    assert_eq!(after.code(), ErrorCode::NotFound);
    let embed = EmbedRequest { model: Some("a".into()), ..EmbedRequest::new(Prompt::Text("x".into())) };
    assert_eq!(handle.validate_embed(embed).err().map(|error| error.code()), Some(ErrorCode::NotFound));
    assert_eq!(handle.adapters().unload("a").expect_err("twice").code(), ErrorCode::NotFound);
    // Another takes its name, and the slot, while those before still run.
    handle.adapters().load("a", "lora/demo_b").unwrap();
    let others: Vec<_> = (0..6).map(|index| submit(&handle, Some("a"), index)).collect();
    for (index, generation) in running.into_iter().enumerate() {
        same(outcome(generation), &expected[index], "what ran keeps its adapter");
    }
    same(outcome(handle.submit(validated).unwrap()), &expected[0], "what was let in keeps its adapter");
    for (index, generation) in others.into_iter().enumerate() {
        same(outcome(generation), &outcome(submit(&handle, Some("b"), index as u32)), "what came later");
    }
}

#[test]
fn an_aborted_or_dropped_request_gives_its_slot_back() {
    let engine = engine(1, false);
    let handle = engine.handle();
    let expected = outcome(submit(&handle, Some("b"), 3));
    for by_drop in [false, true] {
        let mut long = request(Some("a"), 1);
        long.sampling.max_tokens = Some(900);
        long.prompt = Prompt::TokenIds(vec![TokenId(5)]);
        let mut running = handle.submit(handle.validate(long).unwrap()).unwrap();
        running.next_blocking().unwrap().unwrap();
        let waiting = submit(&handle, Some("b"), 3);
        // Without an adapter nobody waits for a slot.
        assert!(!outcome(submit(&handle, None, 2)).0.is_empty());
        match by_drop {
            true => drop(running),
            false => {
                handle.abort_blocking(running.id().clone()).unwrap();
            }
        }
        same(outcome(waiting), &expected, "whoever waited runs");
    }
    assert_eq!(handle.stats().kv_blocks.owned, 0);
}

#[test]
fn names_that_are_taken_paths_that_lead_elsewhere_and_more_than_there_is_room_for_are_refused() {
    let engine = engine(2, false);
    let adapters = engine.handle().adapters().clone();
    let code = |result: Result<(), RequestError>| result.expect_err("it must be refused").code();
    for name in ["a", "tidemill-demo"] {
        assert_eq!(code(adapters.load(name, "lora/demo_a")), ErrorCode::AlreadyExists, "{name}");
    }
    let outside = adapter("demo_a").display().to_string();
    let long = "x".repeat(257);
    for path in [
        "",
        ".",
        "..",
        "lora/../lora/demo_a",
        "/",
        "nowhere",
        &outside,
        "lora/demo_a/adapter_config.json",
        "a\0b",
    ] {
        assert_eq!(code(adapters.load("c", path)), ErrorCode::InvalidArgument, "{path:?}");
    }
    for name in ["", "a\nb", &long] {
        assert_eq!(code(adapters.load(name, "lora/demo_a")), ErrorCode::InvalidArgument, "{name:?}");
    }
    // Of another model, and not an adapter at all.
    for path in ["lora/llama_all", "demo"] {
        let error = adapters.load("c", path).expect_err("wrong files").to_string();
        assert!(error.contains(path) && !error.contains(&fixtures().display().to_string()), "{error}");
    }
    adapters.load("c", "lora/demo_a").unwrap();
    assert_eq!(code(adapters.load("d", "lora/demo_a")), ErrorCode::FailedPrecondition, "a fourth of three");
    let names: Vec<_> = adapters.list().into_iter().map(|info| (info.name, info.path)).collect();
    assert_eq!(names[2], ("c".into(), "lora/demo_a".into()));
    adapters.unload("c").unwrap();
    adapters.load("d", "lora/demo_a").unwrap();
}

#[cfg(unix)]
#[test]
fn a_link_that_leads_out_of_the_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(adapter("demo_a"), folder.path().join("link")).unwrap();
    let lora = LoraConfig {
        max_loras: 1,
        max_lora_rank: 4,
        max_cpu_loras: 4,
        modules: Vec::new(),
        dir: Some(folder.path().to_owned()),
    };
    let config = EngineConfig {
        lora: Some(lora),
        device: DeviceChoice::Cpu,
        ..EngineConfig::new(ModelSource::Builtin)
    };
    let engine = Engine::start(config, |_| ()).unwrap();
    assert!(Path::new(&folder.path().join("link/adapter_config.json")).exists());
    let error = engine.handle().adapters().load("x", "link").expect_err("it leads out");
    assert_eq!(error.code(), ErrorCode::InvalidArgument);
}
