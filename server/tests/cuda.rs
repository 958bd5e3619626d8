//! The wire over CUDA kernels: the server in front of an engine on the emulated device.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{Completion, Harness, collect, engine_config, greedy, text};
use tidemill::config::GrpcConfig;
use tidemill_engine::{Engine, EngineConfig};
use tidemill_kernels_emu::{EmuDriver, Failure, Schedule};
use tidemill_proto::v1::{AbortStage, FinishReason, GenerateRequest, SamplingParams};
use tonic::Code;

const PROMPTS: [&str; 3] = ["Once upon a time", "The lighthouse keeper found a boat.", "Why?"];

async fn harness(driver: &Arc<EmuDriver>) -> Harness {
    let mut harness = Harness::loading(GrpcConfig::loopback()).await;
    let config = EngineConfig {
        max_num_seqs: Some(4),
        max_num_batched_tokens: Some(48),
        max_model_len: Some(256),
        kv_cache_memory: Some(4 << 20),
        ..engine_config()
    };
    let driver = driver.clone();
    let start = move || Engine::start_on(Some(driver), config, |_| ());
    let engine = tokio::task::spawn_blocking(start).await.unwrap().unwrap();
    harness.server().ready(engine.handle()).await;
    harness.engine = Some(engine);
    harness
}

/// Several streams at once, of which `victim` is aborted after its first token; the others' completions.
async fn serve(harness: &mut Harness) -> Vec<Completion> {
    let sampling = SamplingParams { ignore_eos: true, ..greedy(200) };
    let request = GenerateRequest { request_id: "victim".into(), ..text(PROMPTS[0], sampling) };
    let mut victim = harness.started(request).await;
    let mut streams = Vec::new();
    for prompt in PROMPTS {
        streams.push(harness.inference.generate(text(prompt, greedy(6))).await.unwrap().into_inner());
    }
    let receipt = harness.abort("victim").await;
    assert_eq!((receipt.stage(), receipt.rows_freed), (AbortStage::Decode, 1));
    assert!(receipt.blocks_freed > 0 && receipt.seconds_to_free < 0.1, "{receipt:?}");
    let mut last = FinishReason::Unspecified;
    while let Some(message) = victim.message().await.unwrap() {
        last = message.finish_reason();
    }
    assert_eq!(last, FinishReason::Abort);
    let mut completions = Vec::new();
    for stream in streams {
        completions.push(collect(stream).await.unwrap().remove(0));
    }
    completions
}

#[tokio::test]
async fn streams_and_aborts_over_cuda_kernels_give_the_tokens_of_the_cpu() {
    let mut cpu = Harness::start().await;
    let mut cuda = harness(&Arc::new(EmuDriver::new(Schedule::default()))).await;
    for (i, completion) in serve(&mut cuda).await.into_iter().enumerate() {
        let expected = cpu.complete(text(PROMPTS[i], greedy(6))).await;
        assert_eq!((completion.ids, completion.text), (expected.ids, expected.text));
    }
    cuda.at_rest().await;
}

#[tokio::test]
async fn a_kernel_that_faults_ends_all_streams_unavailable() {
    let driver = Arc::new(EmuDriver::new(Schedule::default()));
    let mut harness = harness(&driver).await;
    let long = || text(PROMPTS[0], SamplingParams { ignore_eos: true, ..greedy(200) });
    let running = harness.started(long()).await;
    driver.fail_launch(5, Failure::Faults);
    assert_eq!(collect(running).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(harness.generate(long()).await.unwrap_err().code(), Code::Unavailable);
}
