//! What becomes of a request's life when it has ended: spans at a collector, and a line in the log.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use common::{Harness, alone, greedy, narrow, text};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::{ResourceSpans, Span, status::StatusCode},
};
use tidemill::{config::GrpcConfig, lives::Lives};
use tidemill_engine::{
    explain::{EndedLife, Explanation, Life, LifeEvent, RequestState},
    ids::{RequestId, TenantId},
    output::FinishReason,
};
use tidemill_proto::v1::GenerateRequest;
use tokio::{net::TcpListener, sync::mpsc};
use tonic::{Request, Response, Status};

/// A collector that hands on what it gets.
struct Collector(mpsc::UnboundedSender<ResourceSpans>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for spans in request.into_inner().resource_spans {
            self.0.send(spans).unwrap();
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn collector() -> (SocketAddr, mpsc::UnboundedReceiver<ResourceSpans>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, spans) = mpsc::unbounded_channel();
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(sender)));
    tokio::spawn(server.serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)));
    (address, spans)
}

/// A server with one row whose lives go to this collector.
async fn traced(address: SocketAddr) -> (Harness, Lives) {
    let endpoint = format!("http://{address}").parse().unwrap();
    let (lives, sender) = Lives::start(Some(&endpoint)).unwrap();
    let tune = |config: &mut tidemill_engine::EngineConfig| {
        narrow(config);
        config.lives = Some(sender);
    };
    (Harness::with(tune, GrpcConfig::loopback()).await, lives)
}

fn with_parent(request: GenerateRequest, trace_parent: &str) -> Request<GenerateRequest> {
    let mut request = Request::new(request);
    request.metadata_mut().insert("traceparent", trace_parent.parse().unwrap());
    request
}

/// All spans that arrived, when the server has flushed them.
async fn arrived(lives: Lives, mut spans: mpsc::UnboundedReceiver<ResourceSpans>) -> Vec<Span> {
    lives.finish(Duration::from_secs(5)).await;
    let mut all = Vec::new();
    while let Ok(resource) = spans.try_recv() {
        let attributes = resource.resource.unwrap().attributes;
        let service = attributes.iter().find(|attribute| attribute.key == "service.name").unwrap();
        let name = Some(Value::StringValue("tidemill".into()));
        assert_eq!(service.value.clone().unwrap().value, name);
        all.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
    }
    all
}

fn attribute(span: &Span, key: &str) -> Value {
    let found = span.attributes.iter().find(|attribute| attribute.key == key);
    found.unwrap_or_else(|| panic!("{key}: {span:?}")).value.clone().unwrap().value.unwrap()
}

fn of_request<'a>(spans: &'a [Span], id: &str) -> (&'a Span, Vec<&'a Span>) {
    let id = Value::StringValue(id.into());
    let root = spans
        .iter()
        .find(|span| span.name == "llm_request" && attribute(span, "tidemill.request_id") == id)
        .unwrap_or_else(|| panic!("{id:?} has no span: {spans:?}"));
    (root, spans.iter().filter(|span| span.parent_span_id == root.span_id).collect())
}

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

#[tokio::test]
async fn the_stages_of_a_life_arrive_as_spans_under_the_callers() {
    let (address, spans) = collector().await;
    let (mut harness, lives) = traced(address).await;
    let before = SystemTime::now();
    let running = harness.started(alone("running")).await;
    let request = GenerateRequest {
        request_id: "traced".into(),
        tenant: "fox".into(),
        ..text(&"Once upon a time there was a fox. ".repeat(80), greedy(5))
    };
    let request = with_parent(request, &format!("00-{TRACE}-{PARENT}-01"));
    let waiting = harness.inference.generate(request).await.unwrap().into_inner();
    tokio::time::sleep(Duration::from_millis(30)).await;
    drop(running);
    let completion = common::collect(waiting).await.unwrap().remove(0);
    let usage = completion.last.usage.unwrap();
    harness.at_rest().await;
    let spans = arrived(lives, spans).await;

    let (root, stages) = of_request(&spans, "traced");
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!((hex(&root.trace_id), hex(&root.parent_span_id)), (TRACE.into(), PARENT.into()));
    assert_eq!(attribute(root, "tidemill.tenant"), Value::StringValue("fox".into()));
    assert_eq!(attribute(root, "tidemill.outcome"), Value::StringValue("length".into()));
    assert_eq!(attribute(root, "gen_ai.usage.input_tokens"), Value::IntValue(usage.prompt_tokens.into()));
    assert_eq!(attribute(root, "gen_ai.usage.output_tokens"), Value::IntValue(5));
    let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
    assert_eq!(names, ["queue", "prefill", "decode"]);
    assert!(stages.iter().all(|stage| hex(&stage.trace_id) == TRACE));

    // One after the other, without gaps, from the request's beginning to its end.
    assert_eq!(stages[0].start_time_unix_nano, root.start_time_unix_nano);
    for pair in stages.windows(2) {
        assert_eq!(pair[0].end_time_unix_nano, pair[1].start_time_unix_nano, "{pair:?}");
    }
    assert_eq!(stages[2].end_time_unix_nano, root.end_time_unix_nano);
    let queued = stages[0].end_time_unix_nano - stages[0].start_time_unix_nano;
    assert!(queued >= 25_000_000, "{queued} ns in the queue");
    let nanos = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let test = nanos(before)..nanos(SystemTime::now());
    assert!(test.contains(&root.start_time_unix_nano) && test.contains(&root.end_time_unix_nano));

    // A prompt of more tokens than a step has is read in parts.
    let chunks: Vec<_> = stages[1].events.iter().filter(|event| event.name == "chunk").collect();
    assert!(usage.prompt_tokens > 512 && chunks.len() >= 2, "{usage:?}: {chunks:?}");
    let times: Vec<u64> = chunks.iter().map(|chunk| chunk.time_unix_nano).collect();
    assert!(times.is_sorted() && times[0] >= stages[1].start_time_unix_nano, "{times:?}");

    let (dropped, _) = of_request(&spans, "running");
    assert_eq!(attribute(dropped, "tidemill.outcome"), Value::StringValue("dropped".into()));
    assert!(dropped.parent_span_id.is_empty() && hex(&dropped.trace_id) != TRACE, "a trace of its own");
}

/// A life of two completions, of which one met everything that can happen.
fn eventful(id: &str) -> EndedLife {
    let life = [
        (0, 0, Life::Queued),
        (10, 0, Life::Admitted { cached_tokens: 16 }),
        (11, 0, Life::Chunk { tokens: 34, computed: 50 }),
        (20, 0, Life::FirstToken),
        (21, 1, Life::Admitted { cached_tokens: 48 }),
        (25, 1, Life::FirstToken),
        (30, 0, Life::Preempted),
        (40, 0, Life::Resumed { cached_tokens: 48 }),
        (50, 0, Life::Parked),
        (70, 0, Life::Unparked),
        (75, 0, Life::Resumed { cached_tokens: 48 }),
        (75, 1, Life::Resumed { cached_tokens: 48 }),
        (80, 1, Life::Finished(FinishReason::Stop)),
        (90, 0, Life::Finished(FinishReason::Length)),
    ];
    let event = |(ms, index, what)| LifeEvent { at: Duration::from_millis(ms), index, what };
    EndedLife {
        submitted: Instant::now() - Duration::from_millis(100),
        trace_parent: None,
        explanation: Explanation {
            id: RequestId::new(id),
            state: RequestState::Ended,
            waits_for: None,
            ahead: 0,
            predicted_wait: None,
            priority: 3,
            tenant: TenantId::new("fox"),
            prompt_tokens: 50,
            cached_tokens: 16,
            completion_tokens: 40,
            kv_blocks: 0,
            num_preemptions: 1,
            life: life.map(event).to_vec(),
            events_left_out: 0,
        },
    }
}

#[tokio::test]
async fn preempted_and_parked_stages_are_spans_too_and_lives_are_batched_and_flushed() {
    let (address, spans) = collector().await;
    let endpoint = format!("http://{address}").parse().unwrap();
    let (lives, sender) = Lives::start(Some(&endpoint)).unwrap();
    for number in 0..300 {
        sender.try_send(eventful(&format!("life-{number}"))).unwrap();
    }
    let spans = arrived(lives, spans).await;
    assert_eq!(spans.len(), 300 * 15, "nothing is lost");
    let (root, stages) = of_request(&spans, "life-7");
    let ms = |from: u64, to: u64| (to - from) / 1_000_000;
    let shape: Vec<_> = stages
        .iter()
        .map(|stage| {
            let (from, to) = (stage.start_time_unix_nano, stage.end_time_unix_nano);
            let index = attribute(stage, "tidemill.index");
            (
                stage.name.as_str(),
                index == Value::IntValue(1),
                ms(root.start_time_unix_nano, from),
                ms(from, to),
            )
        })
        .collect();
    let expected = [
        ("queue", false, 0, 10),
        ("prefill", false, 10, 10),
        ("decode", false, 20, 10),
        ("preempted", false, 30, 10),
        ("decode", false, 40, 10),
        ("parked", false, 50, 20),
        ("queue", false, 70, 5),
        ("decode", false, 75, 15),
        ("queue", true, 0, 21),
        ("prefill", true, 21, 4),
        ("decode", true, 25, 25),
        ("parked", true, 50, 20),
        ("queue", true, 70, 5),
        ("decode", true, 75, 5),
    ];
    assert_eq!(shape[..], expected);
    assert_eq!(attribute(root, "tidemill.outcome"), Value::StringValue("stop,length".into()));
    assert_eq!(attribute(root, "tidemill.num_preemptions"), Value::IntValue(1));
    assert_eq!(attribute(stages[4], "tidemill.cached_tokens"), Value::IntValue(48));
}

#[tokio::test]
async fn an_error_marks_its_span_and_a_caller_that_does_not_record_gets_none() {
    let (address, spans) = collector().await;
    let (mut harness, lives) = traced(address).await;
    let running = harness.started(alone("running")).await;
    let late = GenerateRequest { request_id: "late".into(), ..text("Once", greedy(1)) };
    let mut late = with_parent(late, "no traceparent at all");
    late.metadata_mut().insert("grpc-timeout", "50m".parse().unwrap());
    let stream = harness.inference.generate(late).await.unwrap().into_inner();
    common::collect(stream).await.unwrap_err();
    drop(running);
    let quiet = GenerateRequest { request_id: "quiet".into(), ..text("Once", greedy(1)) };
    let quiet = with_parent(quiet, &format!("00-{TRACE}-{PARENT}-00"));
    let stream = harness.inference.generate(quiet).await.unwrap().into_inner();
    common::collect(stream).await.unwrap();
    harness.at_rest().await;
    let spans = arrived(lives, spans).await;
    let (late, stages) = of_request(&spans, "late");
    let status = late.status.clone().unwrap();
    assert_eq!((status.code(), status.message.as_str()), (StatusCode::Error, "DEADLINE_EXCEEDED"));
    assert_eq!(stages.iter().map(|stage| stage.name.as_str()).collect::<Vec<_>>(), ["queue"]);
    let roots = spans.iter().filter(|span| span.name == "llm_request").count();
    assert_eq!(roots, 2, "late and running, not quiet");
}

#[tokio::test]
async fn a_collector_that_is_away_or_hangs_disturbs_nothing() {
    // One port is closed; behind the other, connections are taken and never answered.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    for address in [closed, silent.local_addr().unwrap()] {
        let (mut harness, lives) = traced(address).await;
        for _ in 0..20 {
            assert_eq!(harness.complete(text("Once", greedy(2))).await.ids.len(), 2);
        }
        harness.at_rest().await;
        let started = Instant::now();
        lives.finish(Duration::from_millis(300)).await;
        assert!(
            started.elapsed() < Duration::from_secs(2),
            "the end is not held up: {:?}",
            started.elapsed()
        );
    }
}
