//! Everything that is refused is answered at once, with the right status and details, and harms nobody else.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Harness, endless, greedy, narrow, text};
use tidemill_engine::scheduler::Policy;
use tidemill_proto::v1::{
    ChatMessage, ChatPrompt, DetokenizeRequest, DrainRequest, FinishReason, GenerateRequest, OutputOptions,
    SamplingParams, TokenIds, TokenizeRequest, WatchStatsRequest, generate_request::Prompt,
    tokenize_request::Input,
};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

fn fields(status: &Status) -> Vec<String> {
    let details = status.get_details_bad_request().unwrap_or_else(|| panic!("no BadRequest in {status:?}"));
    details.field_violations.into_iter().map(|violation| violation.field).collect()
}

fn ids(ids: Vec<u32>) -> GenerateRequest {
    GenerateRequest { prompt: Some(Prompt::TokenIds(TokenIds { ids })), ..GenerateRequest::default() }
}

fn sampled(sampling: SamplingParams) -> GenerateRequest {
    text("Once", sampling)
}

fn bad_requests() -> Vec<(&'static str, GenerateRequest)> {
    let d = SamplingParams::default;
    let chat = |messages: Vec<ChatMessage>, tools: &str| GenerateRequest {
        prompt: Some(Prompt::Chat(ChatPrompt {
            messages,
            tools_json: tools.into(),
            ..ChatPrompt::default()
        })),
        ..GenerateRequest::default()
    };
    let user = |content: &str| ChatMessage {
        role: "user".into(),
        content: content.into(),
        ..ChatMessage::default()
    };
    vec![
        ("sampling.temperature", sampled(SamplingParams { temperature: Some(f32::NAN), ..d() })),
        ("sampling.temperature", sampled(SamplingParams { temperature: Some(f32::INFINITY), ..d() })),
        ("sampling.temperature", sampled(SamplingParams { temperature: Some(-0.5), ..d() })),
        ("sampling.top_p", sampled(SamplingParams { top_p: Some(0.0), ..d() })),
        ("sampling.top_p", sampled(SamplingParams { top_p: Some(f32::NAN), ..d() })),
        ("sampling.min_p", sampled(SamplingParams { min_p: Some(1.5), ..d() })),
        ("sampling.repetition_penalty", sampled(SamplingParams { repetition_penalty: Some(0.0), ..d() })),
        ("sampling.presence_penalty", sampled(SamplingParams { presence_penalty: Some(2.5), ..d() })),
        (
            "sampling.frequency_penalty",
            sampled(SamplingParams { frequency_penalty: Some(f32::NEG_INFINITY), ..d() }),
        ),
        ("sampling.logit_bias", sampled(SamplingParams { logit_bias: [(2048, 1.0)].into(), ..d() })),
        ("sampling.logit_bias", sampled(SamplingParams { logit_bias: [(1, f32::NAN)].into(), ..d() })),
        (
            "sampling.logit_bias",
            sampled(SamplingParams { logit_bias: (0..1025).map(|id| (id, 0.0)).collect(), ..d() }),
        ),
        ("sampling.max_tokens", sampled(SamplingParams { max_tokens: Some(0), ..d() })),
        ("sampling.max_tokens", sampled(SamplingParams { max_tokens: Some(1024), ..d() })),
        ("sampling.max_tokens", sampled(SamplingParams { max_tokens: Some(u32::MAX), ..d() })),
        ("sampling.min_tokens", sampled(SamplingParams { min_tokens: Some(5), max_tokens: Some(4), ..d() })),
        ("sampling.stop", sampled(SamplingParams { stop: vec!["".into()], ..d() })),
        ("sampling.stop", sampled(SamplingParams { stop: vec!["x".into(); 17], ..d() })),
        ("sampling.stop", sampled(SamplingParams { stop: vec!["x".repeat(257)], ..d() })),
        ("sampling.stop_token_ids", sampled(SamplingParams { stop_token_ids: vec![u32::MAX], ..d() })),
        ("sampling.stop_token_ids", sampled(SamplingParams { stop_token_ids: vec![1; 65], ..d() })),
        ("sampling.logprobs", sampled(SamplingParams { logprobs: Some(21), ..d() })),
        ("sampling.prompt_logprobs", sampled(SamplingParams { prompt_logprobs: Some(u32::MAX), ..d() })),
        ("sampling.n", sampled(SamplingParams { n: Some(9), ..d() })),
        ("sampling.n", sampled(SamplingParams { n: Some(0), ..d() })),
        (
            "sampling.stop",
            GenerateRequest {
                output: Some(OutputOptions { token_ids_only: true, ..OutputOptions::default() }),
                ..sampled(SamplingParams { stop: vec!["x".into()], ..d() })
            },
        ),
        ("request_id", GenerateRequest { request_id: "x".repeat(257), ..sampled(d()) }),
        ("request_id", GenerateRequest { request_id: "line\nbreak".into(), ..sampled(d()) }),
        ("tenant", GenerateRequest { tenant: "x".repeat(257), ..sampled(d()) }),
        ("cache_salt", GenerateRequest { cache_salt: "x".repeat(257), ..sampled(d()) }),
        ("priority", GenerateRequest { priority: 1, ..sampled(d()) }),
        ("priority", GenerateRequest { priority: i32::MIN, ..sampled(d()) }),
        ("prompt", GenerateRequest::default()),
        ("prompt.text", text("", d())),
        ("prompt.token_ids", ids(vec![])),
        ("prompt.token_ids", ids(vec![1, 2048])),
        ("prompt.token_ids", ids(vec![u32::MAX])),
        ("prompt.token_ids", ids(vec![5; 1024])),
        ("prompt.text", text(&"word ".repeat(2000), d())),
        ("prompt.chat", chat(vec![user("hello")], "{\"not\": \"an array\"}")),
        ("prompt.chat", chat(vec![user("hello")], "not json")),
        ("prompt.chat", chat(vec![user("hello")], &"[".repeat(100_000))),
        ("prompt.chat", chat(vec![ChatMessage { tool_calls_json: "{".into(), ..user("") }], "")),
        ("prompt.chat", chat(vec![user("x"); 5000], "")),
    ]
}

#[tokio::test]
async fn every_kind_of_bad_request_names_its_field_and_the_next_request_is_served() {
    let mut harness = Harness::start().await;
    let canary = harness.complete(text("Once upon a time", greedy(10))).await.ids;
    for (number, (field, request)) in bad_requests().into_iter().enumerate() {
        let status = harness.generate(request).await.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "#{number} {field}: {status:?}");
        assert!(fields(&status).iter().any(|found| found == field), "#{number} {field}: {status:?}");
        assert!(
            status.metadata().get("x-request-id").is_some() || field == "request_id",
            "#{number} {field}"
        );
    }
    assert_eq!(harness.complete(text("Once upon a time", greedy(10))).await.ids, canary);
    let stats = harness.at_rest().await;
    assert_eq!((stats.requests_finished_total, stats.requests_failed_total), (2, 0));
}

#[tokio::test]
async fn all_that_is_wrong_is_told_at_once() {
    let mut harness = Harness::start().await;
    let sampling =
        SamplingParams { temperature: Some(-1.0), top_p: Some(7.0), n: Some(9), ..SamplingParams::default() };
    let status = harness.generate(text("Once", sampling)).await.unwrap_err();
    assert_eq!(fields(&status), ["sampling.temperature", "sampling.top_p", "sampling.n"]);
}

#[tokio::test]
async fn a_thousand_violations_do_not_outgrow_the_clients_header_limit() {
    let mut harness = Harness::start().await;
    let logit_bias = (0..1024).map(|id| (id, 1e9)).collect();
    let status = harness
        .generate(sampled(SamplingParams { logit_bias, ..SamplingParams::default() }))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let model = "m".repeat(100_000);
    let status = harness.generate(GenerateRequest { model, ..sampled(greedy(1)) }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound, "{status:?}");
}

#[tokio::test]
async fn gigantic_prompts_are_refused_quickly() {
    let mut harness = Harness::start().await;
    let started = Instant::now();
    let status = harness.generate(text(&"lorem ipsum ".repeat(350_000), greedy(1))).await.unwrap_err();
    assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec!["prompt.text".to_owned()]));
    let status = harness.generate(ids(vec![7; 4_000_000])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    let request =
        TokenizeRequest { input: Some(Input::Text("x".repeat(5 << 20))), ..TokenizeRequest::default() };
    // More than the client's default limit for what it sends is none of tonic's; ours is 64 MiB.
    let status = harness.inference.tokenize(request).await.unwrap_err();
    assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec!["text".to_owned()]));
}

#[tokio::test]
async fn another_model_is_not_found_and_an_id_lives_once() {
    let mut harness = Harness::start().await;
    let status =
        harness.generate(GenerateRequest { model: "gpt-17".into(), ..sampled(greedy(1)) }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("gpt-17") && status.message().contains("tidemill-demo"), "{status:?}");
    let first = harness.started(endless("twin")).await;
    let status = harness
        .generate(GenerateRequest { request_id: "twin".into(), ..sampled(greedy(1)) })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(status.get_details_request_info().unwrap().request_id, "twin");
    assert_eq!(
        harness.abort("twin").await.stage(),
        tidemill_proto::v1::AbortStage::Decode,
        "the first lives on"
    );
    drop(first);
    let again = GenerateRequest { request_id: "twin".into(), ..sampled(greedy(1)) };
    assert_eq!(harness.complete(again).await.ids.len(), 1, "an id may come again when its request is over");
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_says_when_to_retry() {
    let mut harness = Harness::tuned(narrow).await;
    let _running = harness.started(endless("running")).await;
    let mut client = harness.inference.clone();
    let waiting = tokio::spawn(async move { client.generate(text("Once", greedy(1))).await.unwrap() });
    let _waiting = waiting.await.unwrap();
    let started = Instant::now();
    let status = harness.generate(text("Once", greedy(1))).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.get_details_retry_info().unwrap().retry_delay.unwrap() > Duration::ZERO);
    assert!(started.elapsed() < Duration::from_millis(500));
    assert_eq!(harness.stats().await.requests_refused_total, 1);
}

fn with_timeout(request: GenerateRequest, timeout: &str) -> Request<GenerateRequest> {
    let mut request = Request::new(request);
    request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
    request
}

#[tokio::test]
async fn a_deadline_ends_a_running_and_a_waiting_request() {
    let mut harness = Harness::tuned(narrow).await;
    let started = Instant::now();
    let mut stream =
        harness.inference.generate(with_timeout(endless("running"), "300m")).await.unwrap().into_inner();
    stream.message().await.unwrap().expect("it runs");
    let waiting =
        harness.inference.generate(with_timeout(text("Once", greedy(1)), "150m")).await.unwrap().into_inner();
    let status = common::collect(waiting).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "never had a first token: {status:?}");
    assert!(started.elapsed() >= Duration::from_millis(150));
    let status = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "ended well"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    let took = started.elapsed();
    assert!((Duration::from_millis(290)..Duration::from_millis(1500)).contains(&took), "{took:?}");
    assert_eq!(harness.at_rest().await.requests_failed_total, 2);
}

#[tokio::test]
async fn malformed_deadlines_are_refused_and_long_ones_are_kept() {
    let mut harness = Harness::start().await;
    for timeout in ["5", "abc", "-1S", "123456789S", "1s"] {
        let status = harness.inference.generate(with_timeout(sampled(greedy(1)), timeout)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{timeout}: {status:?}");
    }
    for timeout in ["99999999H", "10S", "60000m"] {
        let stream =
            harness.inference.generate(with_timeout(sampled(greedy(1)), timeout)).await.unwrap().into_inner();
        assert_eq!(common::collect(stream).await.unwrap()[0].finish, FinishReason::Length, "{timeout}");
    }
}

#[tokio::test]
async fn the_small_calls_refuse_too() {
    let mut harness = Harness::start().await;
    let status = harness.inference.tokenize(TokenizeRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let request = DetokenizeRequest { token_ids: vec![1, 9999], include_special_tokens: true };
    let status = harness.inference.detokenize(request).await.unwrap_err();
    assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec!["token_ids".to_owned()]));
    for interval in [0, 9, 60_001] {
        let request = WatchStatsRequest { interval_ms: Some(interval) };
        assert_eq!(harness.control.watch_stats(request).await.unwrap_err().code(), Code::InvalidArgument);
    }
    for seconds in [-1.0, f64::NAN, f64::INFINITY] {
        let request = DrainRequest { timeout_seconds: Some(seconds) };
        assert_eq!(
            harness.control.drain(request).await.unwrap_err().code(),
            Code::InvalidArgument,
            "{seconds}"
        );
    }
    assert!(!harness.stats().await.draining, "a refused drain drains nothing");
}

#[tokio::test]
async fn a_priority_that_would_have_no_effect_names_the_option_that_gives_it_one() {
    for policy in [Policy::Fcfs, Policy::Fair] {
        let mut harness = Harness::tuned(|config| config.scheduling.policy = policy).await;
        let urgent = GenerateRequest { priority: -1, ..sampled(greedy(1)) };
        let status = harness.generate(urgent).await.unwrap_err();
        assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec!["priority".to_owned()]));
        assert!(status.message().contains("--scheduling-policy priority"), "{policy:?}: {status:?}");
        let tenant = GenerateRequest { tenant: "fox".into(), ..sampled(greedy(1)) };
        assert_eq!(harness.complete(tenant).await.ids.len(), 1, "a tenant is accepted under {policy:?}");
    }
}
