//! Who is let in, and what probes learn: credentials, TLS, health, reflection, the time before the model is there and after the
//! engine is gone.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use common::{Harness, endless, engine_config, greedy, text};
use prost::Message;
use prost_types::FileDescriptorSet;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tidemill::{
    config::{GrpcConfig, TlsConfig},
    grpc::auth::ApiKeys,
};
use tidemill_engine::Engine;
use tidemill_proto::{
    smg::grpc::common::GetTokenizerRequest,
    v1::{
        ExplainRequest, GenerateRequest, GetModelRequest, GetStatsRequest, control_client::ControlClient,
        inference_client::InferenceClient,
    },
    vllm::grpc::engine::{self as vllm, vllm_engine_client::VllmEngineClient},
};
use tokio_stream::StreamExt;
use tonic::{
    Code, Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_prost::ProstCodec;
use tonic_reflection::pb::{v1, v1alpha};

const SERVICES: [&str; 4] =
    ["", "tidemill.v1.Inference", "tidemill.v1.Control", "vllm.grpc.engine.VllmEngine"];

async fn health(channel: &Channel, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.into() };
    HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner().status()
}

async fn all_healths(channel: &Channel) -> Vec<ServingStatus> {
    let mut all = Vec::new();
    for service in SERVICES {
        all.push(health(channel, service).await);
    }
    all
}

/// Calls a method with an empty message and a header.
async fn call(
    channel: &Channel,
    path: &str,
    header: Option<(&'static str, &str)>,
) -> Result<(), tonic::Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let mut request = Request::new(tokio_stream::once(()));
    if let Some((name, value)) = header {
        request.metadata_mut().insert(name, value.parse().unwrap());
    }
    let path = PathAndQuery::try_from(path).unwrap();
    // Bytes of any answer are accepted as an empty message; only the status matters.
    let response = grpc.streaming(request, path, ProstCodec::<(), ()>::default()).await?;
    response.into_inner().message().await.map(|_| ())
}

/// Every path of every service that the server describes.
fn all_paths() -> Vec<String> {
    let sets = [
        tidemill_proto::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        v1::FILE_DESCRIPTOR_SET,
        v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let mut paths = Vec::new();
    for file in sets.into_iter().flat_map(|set| FileDescriptorSet::decode(set).unwrap().file) {
        for service in &file.service {
            let name = format!("{}.{}", file.package(), service.name());
            paths.extend(service.method.iter().map(|method| format!("/{name}/{}", method.name())));
        }
    }
    assert!(paths.len() >= 24, "{paths:?}");
    paths
}

#[tokio::test]
async fn with_keys_every_rpc_but_health_is_closed_to_strangers() {
    let keys = ApiKeys::new(vec!["s3cret".into(), "second".into()]).unwrap();
    let harness = Harness::with(|_| (), GrpcConfig { keys, ..GrpcConfig::loopback() }).await;
    let unknown = "/tidemill.v1.Inference/Invented".to_owned();
    for path in all_paths().into_iter().chain([unknown]) {
        // Drain would end the test; the guard does not know that it is special.
        for header in [None, Some(("authorization", "Bearer wrong")), Some(("x-api-key", "s3cre"))] {
            let result =
                tokio::time::timeout(Duration::from_secs(5), call(&harness.channel, &path, header)).await;
            let code = result.expect("answers").map_or_else(|status| status.code(), |()| Code::Ok);
            if path.starts_with("/grpc.health.v1.Health/") {
                assert_ne!(code, Code::Unauthenticated, "{path}");
            } else {
                assert_eq!(code, Code::Unauthenticated, "{path} with {header:?}");
            }
        }
    }
    let model = "/tidemill.v1.Inference/GetModel";
    for header in
        [("authorization", "Bearer s3cret"), ("authorization", "Api-Key second"), ("x-api-key", "second")]
    {
        call(&harness.channel, model, Some(header)).await.unwrap();
    }
    assert_eq!(all_healths(&harness.channel).await, [ServingStatus::Serving; 4]);
}

#[tokio::test]
async fn before_the_model_is_there_the_port_answers_unavailable() {
    let mut harness = Harness::loading(GrpcConfig::loopback()).await;
    assert_eq!(all_healths(&harness.channel).await, [ServingStatus::NotServing; 4]);
    let status = harness.generate(text("Once", greedy(1))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("loading"), "{status:?}");
    assert_eq!(harness.inference.get_model(GetModelRequest {}).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(harness.control.get_stats(GetStatsRequest {}).await.unwrap_err().code(), Code::Unavailable);
    let mut vllm = VllmEngineClient::new(harness.channel.clone());
    assert_eq!(vllm.health_check(vllm::HealthCheckRequest {}).await.unwrap_err().code(), Code::Unavailable);
    let ids = vllm::TokenizedInput { original_text: String::new(), input_ids: vec![5] };
    let input = Some(vllm::generate_request::Input::Tokenized(ids));
    let request = vllm::GenerateRequest { input, ..vllm::GenerateRequest::default() };
    assert_eq!(vllm.generate(request).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(vllm.get_tokenizer(GetTokenizerRequest {}).await.unwrap_err().code(), Code::Unavailable);
    let mut watch = HealthClient::new(harness.channel.clone())
        .watch(HealthCheckRequest { service: "tidemill.v1.Inference".into() })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    let engine = Engine::start(engine_config(), |_| ()).unwrap();
    harness.server().ready(engine.handle()).await;
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    assert_eq!(all_healths(&harness.channel).await, [ServingStatus::Serving; 4]);
    assert!(vllm.health_check(vllm::HealthCheckRequest {}).await.unwrap().into_inner().healthy);
    assert_eq!(harness.complete(text("Once", greedy(2))).await.ids.len(), 2);
    harness.server().refuse_new_requests().await;
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    let status = harness.generate(text("Once", greedy(1))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
}

#[tokio::test]
async fn when_the_engine_is_gone_streams_end_unavailable_and_health_says_so() {
    let mut harness = Harness::start().await;
    let stream = harness.started(endless("orphan")).await;
    let mut watch = HealthClient::new(harness.channel.clone())
        .watch(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let engine = harness.engine.take();
    tokio::task::spawn_blocking(move || drop(engine)).await.unwrap();
    let status = common::collect(stream).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
}

#[tokio::test]
async fn a_lost_device_ends_the_running_the_queued_and_the_new_unavailable_and_health_says_so() {
    let mut harness = Harness::loading(GrpcConfig::loopback()).await;
    let lost = Arc::new(AtomicBool::new(false));
    let mut config = engine_config();
    common::narrow(&mut config);
    let engine = common::frail_engine(lost.clone(), config);
    harness.server().ready(engine.handle()).await;
    let request = || text("Once upon a time", greedy(1000));
    let running = harness.started(request()).await;
    let queued = harness.inference.generate(request()).await.unwrap().into_inner();
    let mut watch = HealthClient::new(harness.channel.clone())
        .watch(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    lost.store(true, Relaxed);
    for stream in [running, queued] {
        let status = common::collect(stream).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert_eq!(status.message(), "the device is lost; send the request to another replica");
    }
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(harness.generate(request()).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn clients_without_files_find_everything_by_reflection() {
    let harness = Harness::start().await;
    let wanted = [
        "grpc.health.v1.Health",
        "tidemill.v1.Control",
        "tidemill.v1.Inference",
        "vllm.grpc.engine.VllmEngine",
    ];
    let request = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(harness.channel.clone());
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) =
        answers.next().await.unwrap().unwrap().message_response
    else {
        panic!("no list");
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    assert!(wanted.iter().all(|name| names.iter().any(|found| found == name)), "{names:?}");
    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
            "tidemill.v1.GenerateRequest".into(),
        )),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(harness.channel.clone());
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response;
    assert!(
        matches!(
            answer,
            Some(v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_))
        ),
        "{answer:?}"
    );
}

#[tokio::test]
async fn unknown_methods_and_services_are_unimplemented() {
    let harness = Harness::start().await;
    for path in [
        "/tidemill.v1.Inference/Invented",
        "/vllm.Nothing/Generate",
        "/vllm.grpc.engine.VllmEngine/Invented",
        // Gateways ask each engine's health check in turn, to find out which one it is.
        "/sglang.grpc.scheduler.SglangScheduler/HealthCheck",
        "/trtllm.TrtllmService/HealthCheck",
        "/grpc.health.v1.Health/Nope",
        "/",
    ] {
        let status = call(&harness.channel, path, None).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented, "{path}: {status:?}");
    }
}

#[tokio::test]
async fn headers_beyond_the_limit_are_refused_and_the_connection_lives() {
    let harness = Harness::start().await;
    let long = "x".repeat(20 << 10);
    call(&harness.channel, "/tidemill.v1.Inference/GetModel", Some(("x-padding", &long))).await.unwrap_err();
    call(&harness.channel, "/tidemill.v1.Inference/GetModel", None).await.unwrap();
}

/// An authority, and certificates that it signed.
struct Pki {
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { authority }
    }

    /// A certificate for `localhost` and its key.
    fn issue(&self) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".into()]).unwrap();
        (params.signed_by(&key, &self.authority).unwrap(), key)
    }
}

async fn get_model(address: std::net::SocketAddr, tls: ClientTlsConfig) -> Result<(), String> {
    let endpoint = Endpoint::from_shared(format!("https://localhost:{}", address.port())).unwrap();
    let channel = endpoint.tls_config(tls).unwrap().connect().await.map_err(|error| error.to_string())?;
    let answer = InferenceClient::new(channel).get_model(GetModelRequest {}).await;
    answer.map(|_| ()).map_err(|status| status.to_string())
}

#[tokio::test]
async fn tls_serves_those_who_trust_it_and_mutual_tls_only_those_it_trusts() {
    let (pki, other) = (Pki::new(), Pki::new());
    let (certificate, key) = pki.issue();
    for mutual in [false, true] {
        let tls = TlsConfig {
            certificate: certificate.pem().into(),
            key: key.serialize_pem().into(),
            client_ca: mutual.then(|| pki.authority.pem().into()),
        };
        let server = tidemill::grpc::Server::bind(&GrpcConfig { tls: Some(tls), ..GrpcConfig::loopback() })
            .await
            .unwrap();
        let engine = Engine::start(engine_config(), |_| ()).unwrap();
        server.ready(engine.handle()).await;
        let trusting = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pki.authority.pem()));
        let known = |pki: &Pki| {
            let (certificate, key) = pki.issue();
            trusting.clone().identity(Identity::from_pem(certificate.pem(), key.serialize_pem()))
        };
        assert_eq!(
            get_model(server.address(), trusting.clone()).await.is_ok(),
            !mutual,
            "without a certificate"
        );
        get_model(server.address(), known(&pki)).await.unwrap();
        assert_eq!(
            get_model(server.address(), known(&other)).await.is_ok(),
            !mutual,
            "a stranger's certificate"
        );
        let distrusting = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(other.authority.pem()));
        get_model(server.address(), distrusting).await.unwrap_err();
    }
}

/// The first digits of the hash of what a client authenticated with.
fn fingerprint(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

/// Runs a request without a tenant, and with one, and returns whom the server took the two for.
async fn taken_for(channel: Channel, key: Option<&str>) -> [String; 2] {
    let mut taken = Vec::new();
    for (id, tenant) in [("nameless", ""), ("named", "fox")] {
        let request =
            GenerateRequest { request_id: id.into(), tenant: tenant.into(), ..text("Once", greedy(1)) };
        let mut generate = Request::new(request);
        let mut explain = Request::new(ExplainRequest { request_id: id.into() });
        if let Some(key) = key {
            generate.metadata_mut().insert("x-api-key", key.parse().unwrap());
            explain.metadata_mut().insert("x-api-key", key.parse().unwrap());
        }
        let stream = InferenceClient::new(channel.clone()).generate(generate).await.unwrap();
        common::collect(stream.into_inner()).await.unwrap();
        let explanation = ControlClient::new(channel.clone()).explain(explain).await.unwrap().into_inner();
        taken.push(explanation.tenant);
    }
    taken.try_into().unwrap()
}

#[tokio::test]
async fn a_request_without_a_tenant_is_taken_for_its_key_and_in_an_open_server_for_nobody() {
    let keys = ApiKeys::new(vec!["s3cret".into(), "second".into()]).unwrap();
    let closed = Harness::with(|_| (), GrpcConfig { keys, ..GrpcConfig::loopback() }).await;
    for key in ["s3cret", "second"] {
        let taken = taken_for(closed.channel.clone(), Some(key)).await;
        assert_eq!(taken, [fingerprint(key.as_bytes()), "fox".into()]);
    }
    let open = Harness::start().await;
    let taken = taken_for(open.channel.clone(), Some("a key that nobody checks")).await;
    assert_eq!(taken, [String::new(), "fox".into()]);
}

#[tokio::test]
async fn a_client_with_a_certificate_and_no_key_is_taken_for_its_certificate() {
    let pki = Pki::new();
    let (certificate, key) = pki.issue();
    let tls = TlsConfig {
        certificate: certificate.pem().into(),
        key: key.serialize_pem().into(),
        client_ca: Some(pki.authority.pem().into()),
    };
    let grpc = GrpcConfig { tls: Some(tls), ..GrpcConfig::loopback() };
    let server = tidemill::grpc::Server::bind(&grpc).await.unwrap();
    let engine = Engine::start(engine_config(), |_| ()).unwrap();
    server.ready(engine.handle()).await;
    let (certificate, key) = pki.issue();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(pki.authority.pem()))
        .identity(Identity::from_pem(certificate.pem(), key.serialize_pem()));
    let endpoint = Endpoint::from_shared(format!("https://localhost:{}", server.address().port())).unwrap();
    let channel = endpoint.tls_config(tls).unwrap().connect().await.unwrap();
    let taken = taken_for(channel, None).await;
    assert_eq!(taken, [fingerprint(certificate.der()), "fox".into()]);
}
