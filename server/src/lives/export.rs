//! Spans on their way to an OpenTelemetry collector, over OTLP/gRPC. Nothing here disturbs service: what does not fit into the queue or
//! cannot be sent is lost, and the log says so at most once a minute.

use std::{
    str::FromStr,
    time::{Duration, Instant},
};

use axum::http::Uri;
use opentelemetry::KeyValue;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter as _},
};
use tidemill_engine::explain::EndedLife;
use tokio::{
    sync::mpsc::{self, Receiver, Sender, error::TrySendError},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::transport::ClientTlsConfig;

use super::spans::spans;
use crate::exit::Failure;

/// Requests whose spans may wait to be sent.
const QUEUE: usize = 4096;
/// Spans that are sent at once, at least when so many are there.
const BATCH: usize = 512;
/// What a span waits for others to be sent with.
const LINGER: Duration = Duration::from_millis(500);
/// What a collector gets to take a batch.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Between two warnings.
const QUIET: Duration = Duration::from_secs(60);

/// Where an OTLP collector listens for gRPC, such as `http://localhost:4317`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtlpEndpoint(Uri);

impl FromStr for OtlpEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write a URL with http or https, such as http://localhost:4317".to_owned();
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let known = matches!(uri.scheme_str(), Some("http" | "https"));
        if known && uri.authority().is_some() { Ok(Self(uri)) } else { Err(wrong()) }
    }
}

/// The way into the exporting task.
#[derive(Debug)]
pub struct SpanQueue {
    spans: Sender<Vec<SpanData>>,
    lost: Complaints,
}

impl SpanQueue {
    /// Starts a task that exports until its queue is dropped, and then what is left. Nothing is connected before the first span.
    ///
    /// # Errors
    /// Wrong usage when the endpoint cannot be used.
    pub fn start(endpoint: &OtlpEndpoint) -> Result<(Self, JoinHandle<()>), Failure> {
        let exporter = exporter(endpoint)?;
        let (spans, queue) = mpsc::channel(QUEUE);
        let task = tokio::spawn(export(exporter, queue));
        Ok((Self { spans, lost: Complaints::default() }, task))
    }

    /// Queues the spans of a life, or loses them.
    pub fn push(&mut self, life: &EndedLife) {
        let spans = spans(life);
        if spans.is_empty() {
            return;
        }
        if let Err(TrySendError::Full(_)) = self.spans.try_send(spans)
            && let Some(requests) = self.lost.add(Instant::now())
        {
            tracing::warn!(requests, "traces are lost: the collector is slower than requests end");
        }
    }
}

fn exporter(endpoint: &OtlpEndpoint) -> Result<SpanExporter, Failure> {
    let mut builder =
        SpanExporter::builder().with_tonic().with_endpoint(endpoint.0.to_string()).with_timeout(TIMEOUT);
    if endpoint.0.scheme_str() == Some("https") {
        builder = builder.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
    }
    let mut exporter = builder
        .build()
        .map_err(|error| Failure::usage(format_args!("--otlp-endpoint {}: {error}", endpoint.0)))?;
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    exporter.set_resource(&Resource::builder().with_service_name("tidemill").with_attribute(version).build());
    Ok(exporter)
}

async fn export(exporter: SpanExporter, mut queue: Receiver<Vec<SpanData>>) {
    let mut failures = Complaints::default();
    while let Some(mut batch) = queue.recv().await {
        gather(&mut batch, &mut queue).await;
        let error = match timeout(TIMEOUT, exporter.export(batch)).await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", TIMEOUT.as_secs()),
        };
        if let Some(batches) = failures.add(Instant::now()) {
            tracing::warn!(batches, error, "traces cannot be exported and are lost");
        }
    }
}

/// Adds what comes soon, until the batch is large.
async fn gather(batch: &mut Vec<SpanData>, queue: &mut Receiver<Vec<SpanData>>) {
    let enough = sleep(LINGER);
    tokio::pin!(enough);
    while batch.len() < BATCH {
        tokio::select! {
            biased;
            more = queue.recv() => match more {
                Some(more) => batch.extend(more),
                None => return,
            },
            () = &mut enough => return,
        }
    }
}

/// Counts what went wrong, and says when it is time to speak of it.
#[derive(Debug, Default)]
struct Complaints {
    count: u64,
    spoke: Option<Instant>,
}

impl Complaints {
    /// One more; the number since the last warning, if a warning is due.
    fn add(&mut self, now: Instant) -> Option<u64> {
        self.count += 1;
        let due = self.spoke.is_none_or(|spoke| now.duration_since(spoke) >= QUIET);
        due.then(|| {
            self.spoke = Some(now);
            std::mem::take(&mut self.count)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_come_once_a_minute_and_count_what_was_not_said() {
        let (mut complaints, start) = (Complaints::default(), Instant::now());
        assert_eq!(complaints.add(start), Some(1));
        for second in 1..60 {
            assert_eq!(complaints.add(start + Duration::from_secs(second)), None);
        }
        assert_eq!(complaints.add(start + QUIET), Some(60));
    }

    #[test]
    fn an_endpoint_is_a_url_of_a_known_scheme() {
        for good in ["http://localhost:4317", "https://collector.example", "http://[::1]:4317/"] {
            assert!(good.parse::<OtlpEndpoint>().is_ok(), "{good}");
        }
        for bad in ["", "localhost:4317", "collector", "ftp://x:1", "http://", "unix:///tmp/x", "/path"] {
            assert!(bad.parse::<OtlpEndpoint>().is_err(), "{bad}");
        }
    }
}
