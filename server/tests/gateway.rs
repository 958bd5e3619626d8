//! A gateway and its engine: what a client of HTTP gets must not depend on where the engine is, until the engine goes away.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use common::{Harness, engine_config, narrow};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};
use tidemill::{
    auth::ApiKeys,
    client::{EngineClient, LocalEngine, ModelCard, RemoteEngine},
    config::{EngineAddress, GrpcConfig, HttpConfig, TlsConfig},
    grpc::{Phase, Server},
    http::{HttpServer, answer::Parsers},
};
use tidemill_engine::{Engine, ids::TokenId};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// An HTTP front.
struct Front {
    server: HttpServer,
}

/// What came back.
#[derive(Debug)]
struct Reply {
    status: u16,
    head: String,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The pieces of a streamed chat.
    fn streamed(&self) -> String {
        let chunks = self.text.split("\n\n").filter_map(|event| event.strip_prefix("data: {"));
        let content = |chunk: &str| {
            let chunk: Value = serde_json::from_str(&format!("{{{chunk}")).unwrap();
            chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
        };
        chunks.map(content).collect()
    }
}

impl Front {
    async fn of(engine: Arc<dyn EngineClient>, keys: &[&str]) -> Self {
        let keys = ApiKeys::new(keys.iter().map(|key| (*key).to_owned()).collect()).unwrap();
        Self {
            server: HttpServer::bind(&HttpConfig { keys, ..HttpConfig::loopback() }, engine).await.unwrap(),
        }
    }

    /// A connection with a request on it.
    async fn open(&self, key: &str, path: &str, body: Option<&Value>) -> TcpStream {
        let mut stream = TcpStream::connect(self.server.address()).await.unwrap();
        let (method, body) = match body {
            Some(body) => ("POST", body.to_string()),
            None => ("GET", String::new()),
        };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-api-key: {key}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).await.unwrap();
        stream
    }

    async fn call(&self, key: &str, path: &str, body: Option<&Value>) -> Reply {
        let stream = self.open(key, path, body).await;
        tokio::time::timeout(Duration::from_secs(10), rest(stream)).await.expect("an answer, and its end")
    }

    async fn post(&self, path: &str, body: Value) -> Reply {
        self.call("none", path, Some(&body)).await
    }

    async fn get(&self, path: &str) -> Reply {
        self.call("none", path, None).await
    }
}

async fn rest(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, mut body) = text.split_once("\r\n\r\n").unwrap();
    let mut text = String::new();
    if head.contains("transfer-encoding: chunked") {
        while let Some((size, more)) = body.split_once("\r\n") {
            let size = usize::from_str_radix(size, 16).unwrap();
            text.push_str(&more[..size]);
            body = &more[size + 2..];
        }
    } else {
        text.push_str(body);
    }
    Reply { status: head[9..12].parse().unwrap(), head: head.to_owned(), text }
}

fn address(of: SocketAddr) -> EngineAddress {
    EngineAddress { url: format!("http://{of}"), api_key: None, tls_ca: None }
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(10), "not {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The engine of a server through its port.
async fn remote(harness: &Harness) -> Arc<RemoteEngine> {
    let remote = Arc::new(RemoteEngine::new(&address(harness.server().address())).unwrap());
    until("found", || remote.is_healthy()).await;
    remote
}

fn question(more: Value) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": "What is a KV cache?"}], "temperature": 0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn endless() -> Value {
    json!({"prompt": "The tide", "max_tokens": 900, "temperature": 0, "ignore_eos": true, "stream": true})
}

/// Without what differs from answer to answer.
fn bare(reply: &Reply) -> Value {
    let mut answer = reply.json();
    for field in ["id", "created"] {
        answer[field] = Value::Null;
    }
    answer
}

#[tokio::test]
async fn a_client_cannot_tell_where_the_engine_is() {
    let harness = Harness::start().await;
    let local: Arc<dyn EngineClient> =
        Arc::new(LocalEngine::new(harness.server().lifecycle(), Parsers::default()));
    let remote = remote(&harness).await;
    same_card(&local.model().unwrap(), &remote.model().unwrap());
    let fronts = [Front::of(local, &[]).await, Front::of(remote, &[]).await];
    let asks = [
        ("/v1/chat/completions", question(json!({"logprobs": true, "top_logprobs": 2}))),
        ("/v1/chat/completions", question(json!({"n": 2, "stop": ["keys"], "max_tokens": 60}))),
        ("/v1/chat/completions", question(json!({"guided_choice": ["ebb", "flood"]}))),
        (
            "/v1/completions",
            json!({"prompt": "Once", "echo": true, "logprobs": 3, "max_tokens": 5, "temperature": 0}),
        ),
        ("/v1/completions", json!({"prompt": "Once", "temperature": -1, "n": 99})),
        ("/v1/completions", json!({"prompt": "tide ".repeat(2000)})),
        ("/v1/completions", json!({"prompt": "Once", "model": "another"})),
        ("/v1/chat/completions", question(json!({"guided_regex": "("}))),
        ("/tokenize", json!({"messages": [{"role": "user", "content": "a"}], "return_token_strs": true})),
        ("/tokenize", json!({"prompt": "Größe 🦀"})),
        ("/detokenize", json!({"tokens": [72, 73]})),
        ("/detokenize", json!({"tokens": [4_000_000]})),
        ("/abort", json!({"request_id": "nobody"})),
        ("/abort", json!({"request_id": "x".repeat(300)})),
    ];
    for (path, body) in asks {
        let [direct, through] = [fronts[0].post(path, body.clone()).await, fronts[1].post(path, body).await];
        assert_eq!((direct.status, bare(&direct)), (through.status, bare(&through)), "{path}");
    }
    let stream = fronts[1].post("/v1/chat/completions", question(json!({"stream": true}))).await;
    assert!(stream.streamed().contains("A KV cache keeps the keys and values"), "{stream:?}");
    assert!(stream.text.ends_with("data: [DONE]\n\n"));
    let metrics = fronts[1].get("/metrics").await;
    assert!(metrics.text.contains("vllm:generation_tokens_total{"), "{metrics:?}");
}

fn same_card(local: &ModelCard, remote: &ModelCard) {
    let shown = |card: &ModelCard| {
        let tokens = (0..card.vocab_size).map(|id| card.tokens.bytes(TokenId(id as u32)).to_vec());
        let tokens: Vec<Vec<u8>> = tokens.collect();
        let ModelCard {
            served_model_name,
            max_model_len,
            vocab_size,
            has_chat_template,
            block_size,
            num_kv_blocks,
            tokens: _,
            special_tokens,
            tool_format,
            reasoning,
            created: _,
            has_tokenizer,
        } = card.clone();
        let sizes = (max_model_len, vocab_size, block_size, num_kv_blocks);
        let has = (has_chat_template, has_tokenizer);
        (served_model_name, sizes, has, special_tokens, tool_format, reasoning, tokens)
    };
    assert!(local.tool_format.is_some() && !local.special_tokens.is_empty(), "or this shows nothing");
    assert_eq!(shown(local), shown(remote));
}

#[tokio::test]
async fn end_clients_of_one_gateway_do_not_share_cached_prefixes() {
    let harness = Harness::start().await;
    let front = Front::of(remote(&harness).await, &["first", "second"]).await;
    let body = json!({"prompt": "The tide comes and goes. ".repeat(20), "max_tokens": 1});
    let mut cached = Vec::new();
    for key in ["first", "first", "second", "second"] {
        let answer = front.call(key, "/v1/completions", Some(&body)).await.json();
        cached.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
    }
    assert_eq!(cached, [false, true, false, true]);
}

#[tokio::test]
async fn an_engine_may_come_late_and_go_and_come_back() {
    let mut loading = Harness::loading(GrpcConfig::loopback()).await;
    let at = loading.server().address();
    let remote = Arc::new(RemoteEngine::new(&address(at)).unwrap());
    let front = Front::of(remote.clone(), &[]).await;
    assert_eq!(front.get("/health").await.status, 200);
    assert_eq!(front.get("/ready").await.status, 503);
    let refused = front.post("/v1/completions", endless()).await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (503, Some("unavailable")));
    let engine = Engine::start(engine_config(), |_| ()).unwrap();
    loading.server().ready(engine.handle()).await;
    until("found", || remote.is_healthy()).await;
    assert_eq!(front.post("/v1/chat/completions", question(json!({}))).await.status, 200);
    // It goes away under a stream: an error at its end, and no end that looks like an ordinary one.
    let stream = front.open("none", "/v1/completions", Some(&endless())).await;
    loading.until("running", |stats| stats.num_requests_running == 1).await;
    loading.server.take().unwrap().stop(Duration::ZERO).await;
    drop(engine);
    let cut = rest(stream).await;
    assert!(cut.text.contains("\"error\"") && !cut.text.contains("finish_reason\":\"stop"), "{cut:?}");
    until("lost", || remote.phase() == Phase::Loading).await;
    assert_eq!(front.post("/v1/completions", endless()).await.status, 503);
    let again = Harness::with(|_| (), GrpcConfig { addresses: vec![at], ..GrpcConfig::loopback() }).await;
    let started = Instant::now();
    until("found again", || remote.is_healthy()).await;
    assert!(started.elapsed() < Duration::from_millis(1500), "{:?}", started.elapsed());
    assert_eq!(front.post("/v1/chat/completions", question(json!({}))).await.status, 200);
    drop(again);
}

#[tokio::test]
async fn a_client_that_leaves_is_aborted_in_the_engine_and_overload_is_passed_on() {
    let mut harness = Harness::tuned(narrow).await;
    let front = Front::of(remote(&harness).await, &[]).await;
    let running = front.open("none", "/v1/completions", Some(&endless())).await;
    harness.until("running", |stats| stats.num_requests_running == 1).await;
    let waiting = front.open("none", "/v1/completions", Some(&endless())).await;
    harness.until("waiting", |stats| stats.num_requests_waiting == 1).await;
    let refused = front.post("/v1/completions", endless()).await;
    assert!(refused.status == 429 && refused.head.contains("retry-after: "), "{refused:?}");
    drop((running, waiting));
    let stats = harness.at_rest().await;
    assert_eq!(stats.requests_aborted_total, 2);
}

#[tokio::test]
async fn a_gateway_that_goes_down_lets_the_running_finish_and_cuts_off_what_does_not() {
    let mut harness = Harness::start().await;
    let remote = remote(&harness).await;
    let front = Front::of(remote.clone(), &[]).await;
    let stream = front.open("none", "/v1/completions", Some(&endless())).await;
    harness.until("running", |stats| stats.num_requests_running == 1).await;
    remote.refuse_new_requests();
    let refused = front.post("/v1/completions", endless()).await;
    assert!(refused.status == 503 && refused.text.contains("draining"), "{refused:?}");
    assert_eq!(front.get("/ready").await.status, 503);
    assert_eq!(remote.drained(Duration::from_secs(60)).await, 0);
    assert!(rest(stream).await.text.contains("\"finish_reason\":\"length\""));

    let remote = self::remote(&harness).await;
    let front = Front::of(remote.clone(), &[]).await;
    let stream = front.open("none", "/v1/completions", Some(&endless())).await;
    harness.until("running", |stats| stats.num_requests_running == 1).await;
    remote.refuse_new_requests();
    assert_eq!(remote.drained(Duration::ZERO).await, 1);
    let cut = rest(stream).await;
    assert!(cut.text.contains("\"error\"") && !cut.text.contains("\"finish_reason\":\"length\""), "{cut:?}");
    harness.at_rest().await;
}

#[tokio::test]
async fn the_engine_lets_in_who_has_its_key() {
    let keys = ApiKeys::new(vec!["s3cret".into()]).unwrap();
    let harness = Harness::with(|_| (), GrpcConfig { keys, ..GrpcConfig::loopback() }).await;
    let with = |key: &str| {
        let api_key = Some(key.to_owned());
        RemoteEngine::new(&EngineAddress { api_key, ..address(harness.server().address()) })
    };
    let (good, bad) = (Arc::new(with("s3cret").unwrap()), Arc::new(with("wrong").unwrap()));
    until("found", || good.is_healthy()).await;
    assert_eq!(
        Front::of(good, &[]).await.post("/v1/chat/completions", question(json!({}))).await.status,
        200
    );
    let refused = Front::of(bad, &[]).await.post("/v1/chat/completions", question(json!({}))).await;
    assert_eq!(refused.status, 503, "the client is not to blame: {refused:?}");
    assert!(with("with space").is_err() && with("").is_err());
}

#[tokio::test]
async fn an_engine_with_a_certificate_is_believed_by_who_trusts_its_authority() {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["localhost".into()]).unwrap().signed_by(&key, &authority).unwrap();
    let tls =
        TlsConfig { certificate: certificate.pem().into(), key: key.serialize_pem().into(), client_ca: None };
    let server = Server::bind(&GrpcConfig { tls: Some(tls), ..GrpcConfig::loopback() }).await.unwrap();
    let engine = Engine::start(engine_config(), |_| ()).unwrap();
    server.ready(engine.handle()).await;
    let reach = |tls_ca| {
        let url = format!("https://localhost:{}", server.address().port());
        Arc::new(RemoteEngine::new(&EngineAddress { url, api_key: None, tls_ca }).unwrap())
    };
    let (believing, doubting) = (reach(Some(authority.pem().into())), reach(None));
    until("found", || believing.is_healthy()).await;
    let front = Front::of(believing, &[]).await;
    assert_eq!(front.post("/v1/chat/completions", question(json!({}))).await.status, 200);
    let front = Front::of(doubting, &[]).await;
    assert_eq!(front.post("/v1/chat/completions", question(json!({}))).await.status, 503);
}
