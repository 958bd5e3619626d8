//! Adapters through the wire: gRPC, HTTP, and a gateway give the same answers, and the same refusals.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::{path::PathBuf, sync::Arc};

use common::{Harness, alone, greedy, text};
use serde_json::{Value, json};
use tidemill::{
    client::{EngineClient, LocalEngine, RemoteEngine},
    config::{EngineAddress, GrpcConfig, HttpConfig},
    grpc::Phase,
    http::{HttpServer, answer::Parsers},
};
use tidemill_engine::{EngineConfig, LoraConfig};
use tidemill_proto::v1::{
    FinishReason, GenerateRequest, GetModelRequest, LoadAdapterRequest, UnloadAdapterRequest,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;

const PROMPT: &str = "The lighthouse keeper found a small boat";

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures/lora")
}

fn with_adapters(config: &mut EngineConfig) {
    config.lora = Some(LoraConfig {
        max_loras: 1,
        max_lora_rank: 4,
        max_cpu_loras: 2,
        modules: vec![("a".into(), folder().join("demo_a"))],
        dir: Some(folder()),
    });
}

fn asked(model: &str) -> GenerateRequest {
    GenerateRequest { model: model.into(), ..text(PROMPT, greedy(12)) }
}

fn load(lora_name: &str, lora_path: &str) -> LoadAdapterRequest {
    LoadAdapterRequest { lora_name: lora_name.into(), lora_path: lora_path.into() }
}

fn unload(lora_name: &str) -> UnloadAdapterRequest {
    UnloadAdapterRequest { lora_name: lora_name.into() }
}

/// An HTTP front of an engine.
struct Front(HttpServer);

impl Front {
    async fn of(engine: Arc<dyn EngineClient>) -> Self {
        Self(HttpServer::bind(&HttpConfig::loopback(), engine).await.unwrap())
    }

    /// The status and the body.
    async fn ask(&self, request: &str, body: Value) -> (u16, String) {
        let mut connection = TcpStream::connect(self.0.address()).await.unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let head = format!(
            "{request} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        connection.write_all((head + &body).as_bytes()).await.unwrap();
        let mut reply = String::new();
        connection.read_to_string(&mut reply).await.unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn json(&self, request: &str, body: Value) -> (u16, Value) {
        let (status, body) = self.ask(request, body).await;
        (status, serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}")))
    }

    async fn complete(&self, model: &str) -> Value {
        let body = json!({"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0});
        let (status, answer) = self.json("POST /v1/completions", body).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["model"], model, "an answer has the name that was asked for");
        answer["choices"][0]["text"].clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_serves_adapters_by_name_and_loads_and_unloads_them() {
    let mut harness = Harness::tuned(with_adapters).await;
    let base = harness.complete(text(PROMPT, greedy(12))).await;
    let a = harness.complete(asked("a")).await;
    assert_ne!(a.ids, base.ids, "the adapter changes the answer");
    assert_eq!(harness.generate(asked("b")).await.unwrap_err().code(), Code::NotFound);
    harness.control.load_adapter(load("b", "demo_b")).await.unwrap();
    let b = harness.complete(asked("b")).await;
    assert!(b.ids != base.ids && b.ids != a.ids);
    let model = harness.inference.get_model(GetModelRequest {}).await.unwrap().into_inner();
    let named: Vec<_> = model.adapters.iter().map(|adapter| adapter.name.as_str()).collect();
    assert_eq!(named, ["a", "b"]);
    assert_eq!(model.adapters[1].path, "demo_b");
    for (request, code) in
        [(load("b", "demo_a"), Code::AlreadyExists), (load("c", "demo_a"), Code::FailedPrecondition)]
    {
        assert_eq!(harness.control.load_adapter(request).await.unwrap_err().code(), code);
    }
    harness.control.unload_adapter(unload("a")).await.unwrap();
    for (name, path) in [("c", "../demo"), ("c", "/etc"), ("c", ""), ("", "demo_a"), ("c", "llama_all")] {
        let status = harness.control.load_adapter(load(name, path)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name:?} {path:?}: {status:?}");
    }
    assert_eq!(harness.control.unload_adapter(unload("a")).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(harness.generate(asked("a")).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(harness.complete(text(PROMPT, greedy(12))).await.ids, base.ids, "the model is as it was");
    harness.at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_waits_for_a_slot_runs_when_the_one_that_has_it_is_aborted_or_vanishes() {
    let mut harness = Harness::tuned(with_adapters).await;
    harness.control.load_adapter(load("b", "demo_b")).await.unwrap();
    let expected = harness.complete(asked("b")).await.ids;
    for by_abort in [true, false] {
        let long = GenerateRequest { model: "a".into(), ..alone("long") };
        let mut running = harness.started(long).await;
        let mut waiting = harness.inference.generate(asked("b")).await.unwrap().into_inner();
        // Needs no slot.
        harness.complete(text(PROMPT, greedy(2))).await;
        let none = tokio::time::timeout(std::time::Duration::from_millis(100), waiting.message()).await;
        assert!(none.is_err(), "there is one slot, and it is taken: {none:?}");
        if by_abort {
            harness.abort("long").await;
            let mut finish = FinishReason::Unspecified;
            while let Some(message) = running.message().await.unwrap() {
                finish = message.finish_reason();
            }
            assert_eq!(finish, FinishReason::Abort);
        } else {
            drop(running);
        }
        assert_eq!(common::collect(waiting).await.unwrap()[0].ids, expected);
    }
    harness.at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_and_a_gateway_serve_list_load_and_unload_adapters_alike() {
    let mut harness = Harness::tuned(with_adapters).await;
    let expected = harness.complete(asked("a")).await.text;
    let local = LocalEngine::new(harness.server().lifecycle(), Parsers::default());
    let url = format!("http://{}", harness.server().address());
    let address = EngineAddress { url, api_key: None, tls_ca: None };
    let remote = RemoteEngine::new(&address).unwrap();
    while remote.phase() != Phase::Ready {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    for front in [Front::of(Arc::new(local)).await, Front::of(Arc::new(remote)).await] {
        assert_eq!(front.complete("a").await, expected);
        let (status, said) =
            front.ask("POST /v1/load_lora_adapter", json!({"lora_name": "b", "lora_path": "demo_b"})).await;
        assert_eq!((status, said.as_str()), (200, "Success: LoRA adapter 'b' added successfully."));
        assert_ne!(front.complete("b").await, expected);
        let (_, models) = front.json("GET /v1/models", Value::Null).await;
        let list = models["data"].as_array().unwrap();
        let ids: Vec<_> = list.iter().map(|card| card["id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["tidemill-demo", "a", "b"]);
        assert_eq!((&list[2]["parent"], &list[2]["root"]), (&json!("tidemill-demo"), &json!("demo_b")));
        assert!(list[0].get("parent").is_none());
        assert_eq!(front.json("GET /v1/models/b", Value::Null).await, (200, list[2].clone()));
        let chat = json!({"model": "b", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2});
        assert_eq!(front.json("POST /v1/chat/completions", chat).await.1["model"], "b");
        let refusals = [
            (json!({"lora_name": "b", "lora_path": "demo_b"}), 409, "adapter_exists"),
            (json!({"lora_name": "c", "lora_path": "../demo"}), 400, "not_supported"),
            (json!({"lora_name": "c"}), 400, ""),
        ];
        for (body, status, code) in refusals {
            let (got, error) = front.json("POST /v1/load_lora_adapter", body).await;
            assert_eq!(got, status, "{error}");
            assert!(code.is_empty() || error["error"]["code"] == code, "{error}");
        }
        let (status, said) = front.ask("POST /v1/unload_lora_adapter", json!({"lora_name": "b"})).await;
        assert_eq!((status, said.as_str()), (200, "Success: LoRA adapter 'b' removed successfully."));
        let (status, error) =
            front.json("POST /v1/load_lora_adapter", json!({"lora_name": "c", "lora_path": "../demo"})).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!("lora_path")), "{error}");
        for (path, body) in [
            ("POST /v1/unload_lora_adapter", json!({"lora_name": "b"})),
            ("POST /v1/completions", json!({"model": "b", "prompt": "x"})),
            (
                "POST /v1/chat/completions",
                json!({"model": "b", "messages": [{"role": "user", "content": "x"}]}),
            ),
            ("POST /tokenize", json!({"model": "b", "prompt": "x"})),
        ] {
            assert_eq!(front.json(path, body).await.0, 404, "{path}");
        }
    }
    harness.at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_room_for_adapters_none_can_be_loaded() {
    let mut harness = Harness::with(|_| (), GrpcConfig::loopback()).await;
    let status = harness.control.load_adapter(load("a", "demo_a")).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("--enable-lora"), "{status:?}");
    assert_eq!(harness.control.unload_adapter(unload("a")).await.unwrap_err().code(), Code::NotFound);
}
