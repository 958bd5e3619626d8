//! `Inference.Embed` over the wire: what a client gets, and every way to end it.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Harness, alone, endless, greedy, narrow, text};
use tidemill::{config::GrpcConfig, grpc::auth::ApiKeys};
use tidemill_proto::v1::{
    AbortStage, EmbedRequest, EmbedResponse, GetModelRequest, TokenIds, TokenizeRequest,
    embed_request::Prompt, tokenize_request::Input,
};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

const TEXT: &str = "The lighthouse keeper found a small boat";

fn embedding(prompt: &str) -> EmbedRequest {
    EmbedRequest { prompt: Some(Prompt::Text(prompt.into())), ..EmbedRequest::default() }
}

fn named(id: &str) -> EmbedRequest {
    EmbedRequest { request_id: id.into(), ..embedding(TEXT) }
}

async fn embed(harness: &mut Harness, request: EmbedRequest) -> EmbedResponse {
    harness.inference.embed(request).await.unwrap().into_inner()
}

fn length(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

/// An embedding under way, on a task of its own.
fn spawn(
    harness: &Harness,
    request: impl tonic::IntoRequest<EmbedRequest> + Send + 'static,
) -> tokio::task::JoinHandle<Result<EmbedResponse, Status>> {
    let mut client = harness.inference.clone();
    tokio::spawn(async move { client.embed(request).await.map(tonic::Response::into_inner) })
}

#[tokio::test]
async fn a_text_and_its_token_ids_have_one_embedding_of_the_models_width() {
    let mut harness = Harness::start().await;
    let model =
        harness.inference.get_model(GetModelRequest {}).await.unwrap().into_inner().embedding.unwrap();
    assert_eq!((model.pooling.as_str(), model.normalize), ("last", true));
    let response = harness.inference.embed(named("e1")).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "e1");
    let by_text = response.into_inner();
    assert_eq!((by_text.request_id.as_str(), by_text.values.len()), ("e1", model.dimensions as usize));
    assert!((length(&by_text.values) - 1.0).abs() < 1e-6, "{}", length(&by_text.values));
    let request = TokenizeRequest { input: Some(Input::Text(TEXT.into())), add_special_tokens: None };
    let ids = harness.inference.tokenize(request).await.unwrap().into_inner().token_ids;
    assert_eq!((by_text.prompt_tokens as usize, by_text.cached_tokens), (ids.len(), 0));
    let prompt = Some(Prompt::TokenIds(TokenIds { ids }));
    let by_ids = embed(&mut harness, EmbedRequest { prompt, ..EmbedRequest::default() }).await;
    assert!(by_ids.values == by_text.values && by_ids.request_id != "e1");
    let other = embed(&mut harness, embedding("What is a KV cache?")).await;
    assert_ne!(other.values, by_text.values);
    let stats = harness.at_rest().await;
    assert_eq!((stats.requests_finished_total, stats.generation_tokens_total), (3, 0));
}

#[tokio::test]
async fn dimensions_cut_and_normalise_again_and_both_can_be_said() {
    let mut harness = Harness::start().await;
    let whole = embed(&mut harness, EmbedRequest { normalize: Some(false), ..embedding(TEXT) }).await.values;
    assert!((length(&whole) - 1.0).abs() > 0.1, "as the model gives it: {}", length(&whole));
    let cut =
        embed(&mut harness, EmbedRequest { dimensions: Some(16), normalize: Some(false), ..embedding(TEXT) })
            .await
            .values;
    assert_eq!(cut, whole[..16]);
    let unit = embed(&mut harness, EmbedRequest { dimensions: Some(16), ..embedding(TEXT) }).await.values;
    let expected: Vec<f32> = cut.iter().map(|&x| (f64::from(x) / length(&cut)) as f32).collect();
    assert_eq!(unit, expected);
}

#[tokio::test]
async fn many_at_once_beside_a_generation_are_those_of_one_at_a_time() {
    let mut harness = Harness::start().await;
    let prompts: Vec<String> = (1..13).map(|n| TEXT.repeat(n)).collect();
    let mut expected = Vec::new();
    for prompt in &prompts {
        expected.push(embed(&mut harness, embedding(prompt)).await.values);
    }
    let stream = harness.started(alone("beside")).await;
    let pending: Vec<_> = prompts.iter().map(|prompt| spawn(&harness, embedding(prompt))).collect();
    for (pending, expected) in pending.into_iter().zip(expected) {
        assert!(pending.await.unwrap().unwrap().values == expected);
    }
    drop(stream);
    harness.at_rest().await;
}

#[tokio::test]
async fn an_abort_by_its_id_answers_cancelled_with_a_receipt() {
    let mut harness = Harness::tuned(narrow).await;
    let running = harness.started(alone("running")).await;
    let waiting = spawn(&harness, named("waiting"));
    harness.until("waiting", |stats| stats.num_requests_waiting == 1).await;
    let receipt = harness.abort("waiting").await;
    assert_eq!((receipt.stage(), receipt.blocks_freed), (AbortStage::Queued, 0));
    let status = waiting.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Cancelled, "{status:?}");
    assert_eq!(status.metadata().get("x-request-id").unwrap(), "waiting");
    drop(running);
    harness.at_rest().await;
}

#[tokio::test]
async fn a_client_that_goes_away_aborts_it() {
    let mut harness = Harness::tuned(narrow).await;
    let running = harness.started(alone("running")).await;
    let waiting = spawn(&harness, named("waiting"));
    harness.until("waiting", |stats| stats.num_requests_waiting == 1).await;
    waiting.abort();
    harness.until("gone", |stats| stats.num_requests_waiting == 0 && stats.requests_aborted_total == 1).await;
    drop(running);
    harness.at_rest().await;
}

#[tokio::test]
async fn a_deadline_that_passes_in_the_queue_ends_it() {
    let mut harness = Harness::tuned(narrow).await;
    let running = harness.started(alone("running")).await;
    let mut request = Request::new(named("waiting"));
    request.set_timeout(Duration::from_millis(150));
    let status = spawn(&harness, request).await.unwrap().unwrap_err();
    // The server answers some milliseconds before the client's own timer; on a busy machine either may be the first.
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
    harness.until("gone", |stats| stats.num_requests_waiting == 0).await;
    drop(running);
    harness.at_rest().await;
}

#[tokio::test]
async fn what_is_wrong_is_refused_with_its_field() {
    let mut harness = Harness::start().await;
    let ids =
        |ids| EmbedRequest { prompt: Some(Prompt::TokenIds(TokenIds { ids })), ..EmbedRequest::default() };
    for (field, request) in [
        ("prompt", EmbedRequest::default()),
        ("prompt.text", embedding("")),
        ("prompt.token_ids", ids(vec![])),
        ("prompt.token_ids", ids(vec![u32::MAX])),
        ("prompt.token_ids", ids(vec![5; 1025])),
        ("dimensions", EmbedRequest { dimensions: Some(0), ..embedding(TEXT) }),
        ("dimensions", EmbedRequest { dimensions: Some(1 << 20), ..embedding(TEXT) }),
        ("priority", EmbedRequest { priority: 3, ..embedding(TEXT) }),
        ("tenant", EmbedRequest { tenant: "t".repeat(257), ..embedding(TEXT) }),
        ("cache_salt", EmbedRequest { cache_salt: "s".repeat(257), ..embedding(TEXT) }),
        ("request_id", EmbedRequest { request_id: "i".repeat(257), ..embedding(TEXT) }),
    ] {
        let status = harness.inference.embed(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert!(violations.iter().any(|violation| violation.field == field), "{field}: {violations:?}");
    }
    let other = EmbedRequest { model: "another".into(), ..embedding(TEXT) };
    assert_eq!(harness.inference.embed(other).await.unwrap_err().code(), Code::NotFound);
    let running = harness.started(endless("twice")).await;
    assert_eq!(harness.inference.embed(named("twice")).await.unwrap_err().code(), Code::AlreadyExists);
    drop(running);
    // The whole context is room enough for what nothing follows.
    assert_eq!(embed(&mut harness, ids(vec![5; 1024])).await.prompt_tokens, 1024);
    harness.at_rest().await;
}

#[tokio::test]
async fn with_a_key_the_call_is_closed_and_a_full_queue_says_when_to_retry() {
    let keys = ApiKeys::new(vec!["s3cret".into()]).unwrap();
    let mut harness = Harness::with(|_| (), GrpcConfig { keys, ..GrpcConfig::loopback() }).await;
    assert_eq!(harness.inference.embed(embedding(TEXT)).await.unwrap_err().code(), Code::Unauthenticated);
    let mut request = Request::new(embedding(TEXT));
    request.metadata_mut().insert("authorization", "Bearer s3cret".parse().unwrap());
    assert!(!harness.inference.embed(request).await.unwrap().into_inner().values.is_empty());
    let mut harness = Harness::tuned(narrow).await;
    let running = harness.started(alone("running")).await;
    let waiting = harness.inference.generate(text("Once", greedy(5))).await.unwrap();
    let status = harness.inference.embed(embedding(TEXT)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.get_details_retry_info().is_some());
    drop((running, waiting));
    harness.at_rest().await;
}
