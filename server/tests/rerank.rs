//! Rerankers over the wire: `/v1/rerank`, `/v1/score` and `Inference.Score`, in the engine's process and behind a gateway, and every way to end them.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::{path::Path, sync::Arc};

use common::{Harness, narrow};
use serde_json::{Value, json};
use tidemill::{
    auth::ApiKeys,
    client::{EngineClient, LocalEngine, RemoteEngine},
    config::{EngineAddress, GrpcConfig, HttpConfig},
    grpc::Phase,
    http::{HttpServer, answer::Parsers},
};
use tidemill_engine::{ComputeDtype, EngineConfig, model::ModelSource};
use tidemill_proto::v1::{
    EmbedRequest, GetModelRequest, ScoreRequest,
    embed_request::Prompt,
    score_request::{Input, Pair, Tokens},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;
use tonic_types::StatusExt;

const QUERY: &str = "Where is the boat?";
const DOCUMENTS: [&str; 4] = ["The tide is in.", "A fox and a lantern", "the boat is of the keeper", "rain"];

struct Front {
    harness: Harness,
    http: HttpServer,
}

fn cross_encoder(config: &mut EngineConfig) {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures/bert_cross");
    config.source = ModelSource::Dir(fixture);
    config.served_model_name = Some("cross".into());
    config.dtype = ComputeDtype::F32;
}

impl Front {
    async fn tuned(tune: impl FnOnce(&mut EngineConfig), keys: &[&str]) -> Self {
        let harness = Harness::with(tune, GrpcConfig::loopback()).await;
        let engine = LocalEngine::new(harness.server().lifecycle(), Parsers::default());
        let http = serve(Arc::new(engine), keys).await;
        Self { harness, http }
    }

    async fn start() -> Self {
        Self::tuned(cross_encoder, &[]).await
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        post(&self.http, path, &body).await
    }
}

async fn serve(engine: Arc<dyn EngineClient>, keys: &[&str]) -> HttpServer {
    let keys = ApiKeys::new(keys.iter().map(|&key| key.into()).collect()).unwrap();
    HttpServer::bind(&HttpConfig { keys, ..HttpConfig::loopback() }, engine).await.unwrap()
}

async fn send(http: &HttpServer, path: &str, body: &Value) -> TcpStream {
    let mut connection = TcpStream::connect(http.address()).await.unwrap();
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all((head + &body).as_bytes()).await.unwrap();
    connection
}

async fn reply(mut connection: TcpStream) -> (u16, Value) {
    let mut reply = String::new();
    connection.read_to_string(&mut reply).await.unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
}

async fn post(http: &HttpServer, path: &str, body: &Value) -> (u16, Value) {
    reply(send(http, path, body).await).await
}

fn pair(query: &str, document: &str) -> ScoreRequest {
    let pair = Pair { query: query.into(), document: document.into() };
    ScoreRequest { input: Some(Input::Pair(pair)), ..ScoreRequest::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_come_back_in_order_of_their_scores() {
    let mut front = Front::start().await;
    let body = json!({"model": "cross", "query": QUERY, "documents": DOCUMENTS});
    let (status, all) = front.post("/v1/rerank", body).await;
    assert_eq!((status, &all["model"]), (200, &json!("cross")), "{all}");
    let results = all["results"].as_array().unwrap();
    let scores: Vec<f64> = results.iter().map(|one| one["relevance_score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|a, b| a > b) && scores.len() == 4, "{scores:?}");
    let mut tokens = 0;
    for result in results {
        let document = DOCUMENTS[result["index"].as_u64().unwrap() as usize];
        assert_eq!(result["document"]["text"], document);
        // The same over gRPC, one by one.
        let one = front.harness.inference.score(pair(QUERY, document)).await.unwrap().into_inner();
        assert_eq!(json!(one.score), result["relevance_score"], "{document}");
        tokens += one.prompt_tokens;
    }
    assert_eq!(
        (&all["usage"]["prompt_tokens"], &all["usage"]["total_tokens"]),
        (&json!(tokens), &json!(tokens))
    );
    let objects: Vec<Value> = DOCUMENTS.iter().map(|text| json!({"text": text})).collect();
    for path in ["/rerank", "/v2/rerank"] {
        let body = json!({"query": QUERY, "documents": objects, "top_n": 2, "return_documents": false});
        let (status, best) = front.post(path, body).await;
        let expected: Vec<Value> = results[..2]
            .iter()
            .map(|one| json!({"index": one["index"], "relevance_score": one["relevance_score"]}))
            .collect();
        assert_eq!((status, &best["results"]), (200, &Value::from(expected)), "{path}");
    }
    front.harness.at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_are_those_of_each_pair() {
    let front = Front::start().await;
    let (status, of_one) = front.post("/v1/score", json!({"text_1": QUERY, "text_2": DOCUMENTS})).await;
    assert_eq!((status, &of_one["object"]), (200, &json!("list")), "{of_one}");
    let scores = |answer: &Value| -> Vec<Value> {
        answer["data"].as_array().unwrap().iter().map(|one| one["score"].clone()).collect()
    };
    let indices = of_one["data"].as_array().unwrap().iter().map(|one| one["index"].as_u64().unwrap());
    assert!(indices.eq(0..4));
    let queries = vec![QUERY; 4];
    let (_, of_each) = front.post("/score", json!({"queries": queries, "documents": DOCUMENTS})).await;
    assert_eq!(scores(&of_each), scores(&of_one));
    let (_, turned) = front.post("/v1/score", json!({"text_1": DOCUMENTS[0], "text_2": QUERY})).await;
    assert_ne!(scores(&turned)[0], scores(&of_one)[0], "which is the query matters");
    let (status, uneven) =
        front.post("/v1/score", json!({"text_1": ["a", "b"], "text_2": ["c", "c", "c"]})).await;
    assert_eq!((status, &uneven["error"]["param"]), (400, &json!("text_1")), "{uneven}");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_gateway_nothing_is_different() {
    let front = Front::start().await;
    let url = format!("http://{}", front.harness.server().address());
    let remote = Arc::new(RemoteEngine::new(&EngineAddress { url, api_key: None, tls_ca: None }).unwrap());
    while remote.phase() != Phase::Ready {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let gateway = serve(remote, &[]).await;
    for (path, body) in [
        ("/v1/rerank", json!({"query": QUERY, "documents": DOCUMENTS, "request_id": "same"})),
        (
            "/v1/rerank",
            json!({"query": QUERY, "documents": DOCUMENTS, "top_n": 1, "truncate_prompt_tokens": 9}),
        ),
        ("/v1/rerank", json!({"query": QUERY, "documents": ["boat ".repeat(200)]})),
        ("/v1/rerank", json!({"query": QUERY, "documents": ["boat"], "instruction": "Say."})),
        ("/v1/rerank", json!({"query": "", "documents": ["boat"]})),
        ("/v1/embeddings", json!({"input": "boat"})),
    ] {
        let (mut here, mut there) = (front.post(path, body.clone()).await, post(&gateway, path, &body).await);
        for (_, answer) in [&mut here, &mut there] {
            answer.as_object_mut().unwrap().remove("id");
        }
        assert_eq!(here, there, "{path} {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_refused_by_name() {
    let mut front = Front::start().await;
    let long = "boat ".repeat(200);
    for (change, param) in [
        (json!({"documents": []}), "documents"),
        (json!({"documents": vec!["a"; 2049]}), "documents"),
        (json!({"documents": [3]}), "documents"),
        (json!({"documents": [{"title": "a"}]}), "documents"),
        (json!({"documents": [""]}), "documents"),
        (json!({"documents": [long]}), "documents"),
        (json!({"query": ""}), "query"),
        (json!({"query": 7}), "query"),
        (json!({"top_n": -1}), "top_n"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens"),
        (json!({"truncate_prompt_tokens": 3}), "truncate_prompt_tokens"),
        (json!({"truncate_prompt_tokens": 81}), "truncate_prompt_tokens"),
        (json!({"instruction": "Say."}), "instruction"),
        (json!({"max_tokens_per_doc": 3}), "max_tokens_per_doc"),
        (json!({"priority": 3}), "priority"),
        (json!({"user": "u".repeat(257)}), "user"),
    ] {
        let mut body = json!({"query": QUERY, "documents": DOCUMENTS});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let (status, refused) = front.post("/v1/rerank", body).await;
        let named = refused["error"]["param"].as_str().unwrap_or_default().to_owned();
        assert!(status == 400 && named.starts_with(param), "{change}: {status} {refused}");
    }
    let (status, _) =
        front.post("/v1/rerank", json!({"model": "other", "query": "a", "documents": ["b"]})).await;
    assert_eq!(status, 404);
    // What is too long can be cut, where that is asked for.
    let cut = json!({"query": QUERY, "documents": [long], "truncate_prompt_tokens": -1});
    let (status, answer) = front.post("/v1/rerank", cut).await;
    assert_eq!((status, &answer["usage"]["prompt_tokens"]), (200, &json!(80)), "{answer}");
    let tokens = |ids, segments| ScoreRequest {
        input: Some(Input::Tokens(Tokens { ids, segments })),
        ..ScoreRequest::default()
    };
    for (field, request) in [
        ("input", ScoreRequest::default()),
        ("document", pair("a", "")),
        ("prompt.text", pair("a", &"boat ".repeat(200))),
        ("prompt.token_ids", tokens(vec![], vec![])),
        ("prompt.token_ids", tokens(vec![251], vec![])),
        ("segments", tokens(vec![2, 3], vec![0])),
        ("segments", tokens(vec![2, 3], vec![0, 2])),
    ] {
        let status = front.harness.inference.score(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert!(violations.iter().any(|violation| violation.field == field), "{field}: {violations:?}");
    }
    front.harness.at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn models_say_what_they_can_do_instead() {
    let mut front = Front::start().await;
    let model = front.harness.inference.get_model(GetModelRequest {}).await.unwrap().into_inner();
    let scoring = model.scoring.unwrap();
    assert_eq!((scoring.format.as_str(), scoring.is_only_output, model.embedding), ("pair", true, None));
    let embed = EmbedRequest { prompt: Some(Prompt::Text("boat".into())), ..EmbedRequest::default() };
    let status = front.harness.inference.embed(embed).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("/v1/rerank"), "{status:?}");
    let (status, said) = front.post("/v1/completions", json!({"prompt": "boat"})).await;
    assert!(status == 400 && said["error"]["message"].as_str().unwrap().contains("scores pairs"), "{said}");
    let mut front = Front::tuned(|_| (), &[]).await;
    let (status, said) = front.post("/v1/rerank", json!({"query": "a", "documents": ["b"]})).await;
    let message = said["error"]["message"].as_str().unwrap().to_owned();
    assert!(status == 400 && message.contains("/v1/embeddings"), "{said}");
    assert!(message.contains("--classifier-from-token"), "{said}");
    let status = front.harness.inference.score(pair("a", "b")).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
}

fn one_row(config: &mut EngineConfig) {
    cross_encoder(config);
    config.max_num_seqs = Some(1);
}

fn many() -> Value {
    json!({"query": QUERY, "documents": vec!["boat ".repeat(20); 2000], "request_id": "many"})
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_of_one_name_ends_all_of_its_pairs() {
    let mut front = Front::tuned(one_row, &[]).await;
    let waiting = send(&front.http, "/v1/rerank", &many()).await;
    front.harness.until("waiting", |stats| stats.num_requests_waiting > 8).await;
    let (status, receipt) = front.post("/abort", json!({"request_id": "many"})).await;
    assert_eq!(status, 200, "{receipt}");
    let (status, answer) = reply(waiting).await;
    assert_eq!(status, 499, "{answer}");
    let stats = front.harness.at_rest().await;
    assert!(stats.requests_finished_total < 1900, "it was cut short: {stats:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_ends_all_of_its_pairs() {
    let mut front = Front::tuned(one_row, &[]).await;
    let connection = send(&front.http, "/v1/rerank", &many()).await;
    front.harness.until("waiting", |stats| stats.num_requests_waiting > 8).await;
    drop(connection);
    let stats = front.harness.at_rest().await;
    assert!(stats.requests_finished_total < 1900, "it was cut short: {stats:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_when_to_retry_and_keys_close_the_door() {
    let tuned = |config: &mut EngineConfig| {
        narrow(config);
        cross_encoder(config);
    };
    let mut front = Front::tuned(tuned, &[]).await;
    let (status, answer) = front.post("/v1/rerank", many()).await;
    assert_eq!(status, 429, "{answer}");
    front.harness.at_rest().await;
    let front = Front::tuned(cross_encoder, &["s3cret"]).await;
    for path in ["/v1/rerank", "/rerank", "/v2/rerank", "/v1/score", "/score"] {
        let (status, _) = front.post(path, json!({"query": "a", "documents": ["b"]})).await;
        assert_eq!(status, 401, "{path}");
    }
}
