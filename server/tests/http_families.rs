//! What is kept and who may see it, what is given back, and in which order answers are told: the HTTP front over a real engine.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::sync::Arc;

use common::{Harness, greedy, narrow};
use serde_json::{Value, json};
use tidemill::{
    auth::ApiKeys,
    client::LocalEngine,
    config::{GrpcConfig, HttpConfig},
    http::{HttpServer, answer::Parsers},
};
use tidemill_engine::EngineConfig;
use tidemill_proto::{
    smg::grpc::common::GetTokenizerRequest,
    v1,
    vllm::grpc::engine::{self as vllm, vllm_engine_client::VllmEngineClient},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;

/// The built-in model's question whose answer is a sentence.
const QUESTION: &str = "What is a KV cache?";

struct Front {
    harness: Harness,
    http: HttpServer,
}

impl Front {
    async fn start(tune: impl FnOnce(&mut EngineConfig), keys: &[&str]) -> Self {
        let harness = Harness::with(tune, GrpcConfig::loopback()).await;
        let keys = ApiKeys::new(keys.iter().map(|&key| key.into()).collect()).unwrap();
        let engine = LocalEngine::new(harness.server().lifecycle(), Parsers::default());
        let config = HttpConfig { keys, ..HttpConfig::loopback() };
        let http = HttpServer::bind(&config, Arc::new(engine)).await.unwrap();
        Self { harness, http }
    }

    /// A connection on which a request was sent.
    async fn send(&self, request: &str, key: &str, body: &Value) -> TcpStream {
        let mut connection = TcpStream::connect(self.http.address()).await.unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let head = format!(
            "{request} HTTP/1.1\r\nhost: test\r\nconnection: close\r\nx-api-key: {key}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        connection.write_all((head + &body).as_bytes()).await.unwrap();
        connection
    }

    /// The status, and the body as it stands on the wire.
    async fn raw(&self, request: &str, key: &str, body: &Value) -> (u16, String) {
        let mut reply = String::new();
        self.send(request, key, body).await.read_to_string(&mut reply).await.unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn json(&self, request: &str, key: &str, body: Value) -> (u16, Value) {
        let (status, body) = self.raw(request, key, &body).await;
        (status, serde_json::from_str(&body).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_exists_for_the_key_that_made_it() {
    let front = Front::start(|_| (), &["one", "two"]).await;
    let ask = json!({"input": QUESTION, "temperature": 0, "max_output_tokens": 4});
    let (status, made) = front.json("POST /v1/responses", "one", ask).await;
    assert_eq!((status, &made["status"]), (200, &json!("incomplete")), "{made}");
    let id = made["id"].as_str().unwrap();
    let next = json!({"input": "And?", "previous_response_id": id, "max_output_tokens": 1});
    for (request, own) in [
        (format!("GET /v1/responses/{id}"), 200),
        (format!("GET /v1/responses/{id}/input_items"), 200),
        // It is known, and did not run in the background.
        (format!("POST /v1/responses/{id}/cancel"), 400),
        ("POST /v1/responses".to_owned(), 200),
        (format!("DELETE /v1/responses/{id}"), 200),
        (format!("GET /v1/responses/{id}"), 404),
    ] {
        let body = if request.ends_with("responses") { next.clone() } else { Value::Null };
        let (stranger, told) = front.raw(&request, "two", &body).await;
        assert!(stranger == if body.is_null() { 404 } else { 400 }, "{request}: {told}");
        let (status, told) = front.raw(&request, "one", &body).await;
        assert_eq!(status, own, "{request}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_in_the_background_gives_its_blocks_back() {
    let mut front = Front::start(narrow, &[]).await;
    let ask = json!({"input": QUESTION, "background": true, "ignore_eos": true, "max_output_tokens": 900});
    for end in ["cancel", "delete"] {
        let (_, made) = front.json("POST /v1/responses", "", ask.clone()).await;
        assert_eq!((&made["status"], &made["background"]), (&json!("in_progress"), &json!(true)));
        let one = format!("/v1/responses/{}", made["id"].as_str().unwrap());
        front.harness.until("it owns blocks", |stats| stats.kv_blocks_owned > 0).await;
        let (status, ended) = match end {
            "cancel" => front.json(&format!("POST {one}/cancel"), "", Value::Null).await,
            _ => front.json(&format!("DELETE {one}"), "", Value::Null).await,
        };
        assert_eq!(status, 200, "{ended}");
        front.harness.at_rest().await;
        let (status, later) = front.json(&format!("GET {one}"), "", Value::Null).await;
        match end {
            "cancel" => assert_eq!((status, &later["status"]), (200, &json!("cancelled"))),
            _ => assert_eq!(status, 404),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_told_block_by_block_and_ends_with_its_reader() {
    let mut front = Front::start(narrow, &[]).await;
    let messages = json!([{"role": "user", "content": QUESTION}]);
    let ask = json!({"messages": messages, "temperature": 0, "max_tokens": 3, "stream": true});
    let (status, body) = front.raw("POST /v1/messages", "", &ask).await;
    assert_eq!(status, 200, "{body}");
    let mut told: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    told.dedup();
    let order = [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(told, order, "{body}");
    let endless = json!({"messages": messages, "max_tokens": 900, "ignore_eos": true, "stream": true});
    let mut reader = front.send("POST /v1/messages", "", &endless).await;
    reader.read_u8().await.unwrap();
    front.harness.until("it runs", |stats| stats.num_requests_running == 1).await;
    drop(reader);
    front.harness.at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_goes_on_from_what_the_assistant_began() {
    let front = Front::start(|_| (), &[]).await;
    let ask = |messages: Value| json!({"messages": messages, "temperature": 0, "max_tokens": 60});
    let user = json!({"role": "user", "content": QUESTION});
    let (_, whole) = front.json("POST /v1/messages", "", ask(json!([user]))).await;
    let text = whole["content"][0]["text"].as_str().unwrap();
    let begun = &text[..text.find(" of ").unwrap()];
    let turns = json!([user, {"role": "assistant", "content": begun}]);
    let (_, rest) = front.json("POST /v1/messages", "", ask(turns)).await;
    assert_eq!(format!("{begun}{}", rest["content"][0]["text"].as_str().unwrap()), text);
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_of_many_texts_are_in_order_and_those_of_each() {
    let front = Front::start(|_| (), &[]).await;
    let texts = ["The tide comes in", "A fox", "1 2 3"];
    let embed = |input: Value| front.json("POST /v1/embeddings", "", json!({ "input": input }));
    let (status, together) = embed(json!(texts)).await;
    assert_eq!(status, 200, "{together}");
    for (at, text) in texts.iter().enumerate() {
        let (_, alone) = embed(json!(text)).await;
        assert_eq!(together["data"][at]["index"], at);
        assert_eq!(together["data"][at]["embedding"], alone["data"][0]["embedding"], "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_tokenizer_ids_go_in_and_out_over_http() {
    let front = Front::start(|config| config.skip_tokenizer_init = true, &[]).await;
    let ask = async |body: Value| front.raw("POST /v1/completions", "", &body).await;
    let ids = json!([5, 300, 301]);
    let (status, body) =
        ask(json!({"prompt": ids, "max_tokens": 6, "temperature": 0, "ignore_eos": true})).await;
    let whole: Value = serde_json::from_str(&body).unwrap();
    let choice = &whole["choices"][0];
    assert_eq!(
        (status, &choice["text"], choice["token_ids"].as_array().unwrap().len()),
        (200, &json!(""), 6),
        "{body}"
    );
    let asked = json!({"prompt": ids, "max_tokens": 6, "temperature": 0, "ignore_eos": true, "stream": true});
    let (_, stream) = ask(asked).await;
    let chunks = stream
        .lines()
        .filter_map(|line| line.strip_prefix("data: ")?.strip_prefix('{').map(|rest| format!("{{{rest}")));
    let streamed: Vec<Value> = chunks
        .map(|chunk| serde_json::from_str::<Value>(&chunk).unwrap())
        .filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(&Value::Array(streamed), &choice["token_ids"], "{stream}");
    for (route, body) in [
        ("POST /v1/completions", json!({"prompt": "Once"})),
        ("POST /v1/completions", json!({"prompt": ids, "stop": ["."]})),
        ("POST /v1/completions", json!({"prompt": ids, "response_format": {"type": "json_object"}})),
        ("POST /v1/completions", json!({"prompt": ids, "echo": true})),
        ("POST /v1/chat/completions", json!({"messages": [{"role": "user", "content": "Hi"}]})),
        ("POST /v1/messages", json!({"max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]})),
        ("POST /v1/embeddings", json!({"input": "Hi"})),
        ("POST /tokenize", json!({"prompt": "Hi"})),
        ("POST /detokenize", json!({"tokens": [5]})),
        ("POST /predict", json!({"prompt": "Hi"})),
    ] {
        let (status, reply) = front.raw(route, "", &body).await;
        assert!(status == 400 && reply.contains("--skip-tokenizer-init"), "{route} {body}: {status} {reply}");
    }
    let (status, reply) = front.raw("POST /v1/embeddings", "", &json!({"input": ids})).await;
    assert!(status == 200 && reply.contains("embedding"), "{reply}");
    assert_eq!(front.raw("GET /v1/models", "", &Value::Null).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_stand_beside_the_text_where_asked_for() {
    let front = Front::start(|_| (), &[]).await;
    let body = json!({"prompt": "Once", "max_tokens": 5, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let reply: Value = serde_json::from_str(&front.raw("POST /v1/completions", "", &body).await.1).unwrap();
    let choice = &reply["choices"][0];
    let tokens = json!({"tokens": choice["token_ids"]});
    let text: Value = serde_json::from_str(&front.raw("POST /detokenize", "", &tokens).await.1).unwrap();
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 5);
    assert!(
        !choice["text"].as_str().unwrap().is_empty() && text["prompt"] == choice["text"],
        "{text} {choice}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_tokenizer_ids_go_in_and_out_over_grpc() {
    let mut harness = Harness::tuned(|config| config.skip_tokenizer_init = true).await;
    let model = harness.inference.get_model(v1::GetModelRequest {}).await.unwrap().into_inner();
    assert!(model.tokenizer.is_empty() && !model.has_chat_template && model.special_tokens.is_empty());
    let prompt = |prompt| v1::GenerateRequest {
        prompt: Some(prompt),
        sampling: Some(greedy(6)),
        ..Default::default()
    };
    let ids = || v1::generate_request::Prompt::TokenIds(v1::TokenIds { ids: vec![5, 300, 301] });
    let answer = harness.complete(prompt(ids())).await;
    assert!(answer.text.is_empty() && !answer.ids.is_empty());
    let mut with_text = Harness::start().await;
    assert_eq!(
        with_text.complete(prompt(ids())).await.ids,
        answer.ids,
        "the ids do not depend on there being text"
    );
    let kind = with_text.inference.get_model(v1::GetModelRequest {}).await.unwrap().into_inner().tokenizer;
    assert_eq!(kind, "tokenizer.json");
    let mut refused = Vec::new();
    refused
        .push(harness.generate(prompt(v1::generate_request::Prompt::Text("Once".into()))).await.unwrap_err());
    let mut stops = prompt(ids());
    stops.sampling.as_mut().unwrap().stop = vec![".".into()];
    refused.push(harness.generate(stops).await.unwrap_err());
    let text = Some(v1::tokenize_request::Input::Text("x".into()));
    let ask = v1::TokenizeRequest { input: text, ..Default::default() };
    refused.push(harness.inference.tokenize(ask).await.unwrap_err());
    let ask = v1::DetokenizeRequest { token_ids: vec![5], include_special_tokens: false };
    refused.push(harness.inference.detokenize(ask).await.unwrap_err());
    let mut gateway = VllmEngineClient::new(harness.channel.clone());
    refused.push(gateway.get_tokenizer(GetTokenizerRequest {}).await.unwrap_err());
    for status in refused {
        assert!(
            status.code() == Code::FailedPrecondition && status.message().contains("--skip-tokenizer-init"),
            "{status}"
        );
    }
    let input = vllm::TokenizedInput { original_text: String::new(), input_ids: vec![5, 300, 301] };
    let request = vllm::GenerateRequest {
        request_id: "ids".into(),
        input: Some(vllm::generate_request::Input::Tokenized(input)),
        sampling_params: Some(vllm::SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(6),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut stream = gateway.generate(request).await.unwrap().into_inner();
    let mut complete = None;
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(vllm::generate_response::Response::Complete(end)) = message.response {
            complete = Some(end);
        }
    }
    assert_eq!(complete.unwrap().output_ids, answer.ids);
}
