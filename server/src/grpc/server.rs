//! A bound port with all services behind it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::middleware;
use tidemill_engine::EngineHandle;
use tidemill_proto::{
    v1::{control_server::ControlServer, inference_server::InferenceServer},
    vllm::grpc::engine::vllm_engine_server::VllmEngineServer,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{
    service::Routes,
    transport::{Certificate, Identity, ServerTlsConfig},
};
use tonic_health::server::HealthReporter;

use super::{
    auth,
    control::ControlService,
    deadline,
    door::Door,
    incoming,
    inference::InferenceService,
    lifecycle::{Lifecycle, Phase},
    panics,
    vllm::VllmService,
};
use crate::{
    config::{GrpcConfig, TlsConfig},
    exit::{Exit, Failure, with_causes},
};

/// Largest request in bytes.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Largest header list in bytes.
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Streams of one connection at once. Clients keep what is over it to themselves, unseen, so it is more than the engine's queue:
/// overload shall be refused, with a time to retry.
const MAX_STREAMS: u32 = 4096;
/// Older connections are told to go (GOAWAY), so that load balancers can spread their clients anew; their streams end in peace. tonic
/// 0.14 can also add a grace period, but then it closes the connection after it without ever having sent the GOAWAY.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(30 * 60);
/// A TLS handshake takes less.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A gRPC server. It answers from the moment it is bound: UNAVAILABLE until an engine is attached.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    lifecycle: Arc<Lifecycle>,
    task: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Server {
    /// Binds the first address that can be bound and starts serving.
    ///
    /// # Errors
    /// [`Exit::Bind`] when none can be bound; wrong usage when the certificates are no good.
    pub async fn bind(config: &GrpcConfig) -> Result<Self, Failure> {
        let mut builder = tonic::transport::Server::builder()
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .max_concurrent_streams(MAX_STREAMS)
            // A client may cancel all its streams in one breath. The default of 20 would end the connection for that, and
            // with it the streams that were not cancelled.
            .http2_max_pending_accept_reset_streams(Some(MAX_STREAMS as usize))
            .http2_keepalive_interval(Some(config.keepalive.interval))
            .http2_keepalive_timeout(Some(config.keepalive.timeout))
            .max_connection_age(MAX_CONNECTION_AGE);
        if let Some(tls) = &config.tls {
            let wrong = |error| {
                Failure::usage(format_args!(
                    "--tls-cert, --tls-key or --tls-client-ca: {}",
                    with_causes(&error)
                ))
            };
            builder = builder.tls_config(tls_config(tls)).map_err(wrong)?;
        }
        let listener =
            TcpListener::bind(&config.addresses[..]).await.map_err(|error| cannot_bind(config, &error))?;
        let address = listener.local_addr().map_err(|error| cannot_bind(config, &error))?;
        let reporter = HealthReporter::new();
        let lifecycle = Lifecycle::new(reporter.clone()).await;
        let router = builder.add_routes(routes(config, &lifecycle, reporter)?);
        let stopped = lifecycle.clone();
        let task = tokio::spawn(async move {
            router.serve_with_incoming_shutdown(incoming::connections(listener), stopped.stopped()).await
        });
        Ok(Self { address, lifecycle, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        self.lifecycle.phase()
    }

    /// The stage of its life and its engine, for other front ends of the same process.
    pub fn lifecycle(&self) -> Arc<Lifecycle> {
        self.lifecycle.clone()
    }

    /// Serves this engine from now on.
    pub async fn ready(&self, engine: EngineHandle) {
        self.lifecycle.ready(engine).await;
    }

    /// Refuses new requests from now on; health checks say so.
    pub async fn refuse_new_requests(&self) {
        self.lifecycle.enter(Phase::Draining).await;
    }

    /// Ends all streams and closes the port. Connections get `flush` to take what has been written.
    pub async fn stop(mut self, flush: Duration) {
        self.lifecycle.enter(Phase::Stopped).await;
        if tokio::time::timeout(flush, &mut self.task).await.is_err() {
            tracing::debug!("connections are closed that did not close by themselves");
            self.task.abort();
        }
    }
}

/// All services behind the layers that every request passes, whatever its path.
fn routes(
    config: &GrpcConfig,
    lifecycle: &Arc<Lifecycle>,
    reporter: HealthReporter,
) -> Result<Routes, Failure> {
    let health = tonic_health::server::HealthService::from_health_reporter(reporter);
    let door = Door::new(lifecycle.clone());
    let inference = InferenceServer::new(InferenceService::new(door.clone(), config.parsers));
    let vllm = VllmEngineServer::new(VllmService::new(door));
    let control = ControlServer::new(ControlService::new(lifecycle.clone(), config.shutdown_timeout));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tidemill_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let routes = Routes::new(inference.max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(control)
        .add_service(vllm.max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(tonic_health::pb::health_server::HealthServer::new(health))
        .add_service(reflection().build_v1().map_err(Failure::runtime)?)
        .add_service(reflection().build_v1alpha().map_err(Failure::runtime)?);
    // The last layer is the first that a request meets: credentials before anything else is looked at.
    let router = routes
        .into_axum_router()
        .layer(middleware::from_fn(panics::guard))
        .layer(middleware::from_fn(deadline::guard))
        .layer(middleware::from_fn_with_state(config.keys.clone(), auth::guard));
    Ok(Routes::from(router))
}

fn tls_config(tls: &TlsConfig) -> ServerTlsConfig {
    let server = ServerTlsConfig::new()
        .identity(Identity::from_pem(&tls.certificate, &tls.key))
        .timeout(HANDSHAKE_TIMEOUT);
    match &tls.client_ca {
        Some(authority) => server.client_ca_root(Certificate::from_pem(authority)),
        None => server,
    }
}

fn cannot_bind(config: &GrpcConfig, error: &std::io::Error) -> Failure {
    let addresses: Vec<String> = config.addresses.iter().map(ToString::to_string).collect();
    let addresses = addresses.join(", ");
    Failure::new(
        Exit::Bind,
        format_args!(
            "cannot listen on {addresses}: {error}; choose another --grpc-port (0 takes a free one) or --host"
        ),
    )
}
