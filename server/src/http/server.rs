//! The HTTP port: connections, TLS, and what a connection may cost.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    http::{HeaderValue, Method, header},
    middleware,
};
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinHandle,
    time,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tower_http::cors::{AllowHeaders, CorsLayer};

use super::{
    AppState,
    call::REQUEST_ID,
    door::{self, Door},
    routes,
};
use crate::{
    auth::Credential,
    client::EngineClient,
    config::HttpConfig,
    exit::{Exit, Failure},
    tls,
};

/// Largest head of a request in bytes.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// What a client may take to send a head, and to shake hands for TLS.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams of one HTTP/2 connection at once.
const MAX_STREAMS: u32 = 1024;
/// Connections at once.
const MAX_CONNECTIONS: usize = 16 << 10;
/// Rest after an accept that failed, when the process is out of file descriptors, say.
const REST: Duration = Duration::from_millis(50);

/// An HTTP server. It answers from the moment it is bound: 503 until its engine is there.
#[derive(Debug)]
pub struct HttpServer {
    address: SocketAddr,
    scheme: &'static str,
    stopping: CancellationToken,
    task: JoinHandle<()>,
}

impl HttpServer {
    /// Binds the first address that can be bound and starts serving.
    ///
    /// # Errors
    /// [`Exit::Bind`] when none can be bound; wrong usage when the certificates are no good.
    pub async fn bind(config: &HttpConfig, engine: Arc<dyn EngineClient>) -> Result<Self, Failure> {
        let tls = config.tls.as_ref().map(tls::acceptor).transpose()?;
        let listener =
            TcpListener::bind(&config.addresses[..]).await.map_err(|error| cannot_bind(config, &error))?;
        let address = listener.local_addr().map_err(|error| cannot_bind(config, &error))?;
        let app = Arc::new(AppState::new(config, engine));
        let guard = middleware::from_fn_with_state(Door::new(app.clone()), door::guard);
        // The last layer is the first that a request meets. Browsers ask for permission without credentials.
        let router = routes::router(app).layer(guard);
        let router = match cors(&config.allowed_origins)? {
            Some(cors) => router.layer(cors),
            None => router,
        };
        let stopping = CancellationToken::new();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let port = Port { router, tls, config: config.clone(), stopping: stopping.clone() };
        let task = tokio::spawn(port.serve(listener));
        Ok(Self { address, scheme, stopping, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same for browsers.
    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// Closes the port. Connections get `flush` to take what has been written.
    pub async fn stop(mut self, flush: Duration) {
        self.stopping.cancel();
        if time::timeout(flush, &mut self.task).await.is_err() {
            tracing::debug!("connections are closed that did not close by themselves");
            self.task.abort();
        }
    }
}

/// What connections are served with.
struct Port {
    router: Router,
    tls: Option<TlsAcceptor>,
    config: HttpConfig,
    stopping: CancellationToken,
}

impl Port {
    async fn serve(self, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let port = Arc::new(self);
        loop {
            let accepted = tokio::select! {
                biased;
                () = port.stopping.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((connection, _)) => {
                    let Ok(place) = places.clone().try_acquire_owned() else { continue };
                    let port = port.clone();
                    tokio::spawn(async move {
                        port.connection(connection).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    time::sleep(REST).await;
                }
            }
        }
        drop(listener);
        // All places are free when all connections have ended; nobody closes the semaphore.
        drop(places.acquire_many(MAX_CONNECTIONS as u32).await);
    }

    /// One connection from its first byte to its end.
    async fn connection(&self, connection: TcpStream) {
        drop(connection.set_nodelay(true));
        self.keep_alive(&connection);
        // Clients speak first; who says nothing does not hold a place for long.
        if time::timeout(HEAD_TIMEOUT, connection.readable()).await.is_err() {
            return;
        }
        match &self.tls {
            None => self.speak(connection, Credential("".into())).await,
            Some(tls) => {
                let Ok(Ok(stream)) = time::timeout(HEAD_TIMEOUT, tls.accept(connection)).await else {
                    return;
                };
                let certificates = stream.get_ref().1.peer_certificates();
                let own = certificates.and_then(|chain| chain.first());
                let who = own.map_or_else(|| Credential("".into()), |own| Credential::of(own));
                self.speak(stream, who).await;
            }
        }
    }

    /// A peer that vanished without a word is noticed after both of its times.
    fn keep_alive(&self, connection: &TcpStream) {
        let (interval, timeout) = (self.config.keepalive.interval, self.config.keepalive.timeout);
        let socket = socket2::SockRef::from(connection);
        let probes = socket2::TcpKeepalive::new().with_time(interval).with_interval(timeout / 3);
        #[cfg(target_os = "linux")]
        let probes = probes.with_retries(3);
        drop(socket.set_tcp_keepalive(&probes));
        // Where data is under way that is not acknowledged, probes are not sent.
        #[cfg(target_os = "linux")]
        drop(socket.set_tcp_user_timeout(Some(interval + timeout)));
    }

    async fn speak<S>(&self, stream: S, who: Credential)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let router = self.router.clone();
        let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            if !who.0.is_empty() {
                request.extensions_mut().insert(who.clone());
            }
            router.clone().oneshot(request.map(axum::body::Body::new))
        });
        let served = self.protocol().serve_connection(TokioIo::new(stream), service).into_owned();
        let mut served = std::pin::pin!(served);
        let stopping = self.stopping.cancelled();
        let ended = tokio::select! {
            ended = served.as_mut() => ended,
            () = stopping => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection ended");
        }
    }

    fn protocol(&self) -> auto::Builder<TokioExecutor> {
        let mut protocol = auto::Builder::new(TokioExecutor::new());
        protocol
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD_BYTES);
        protocol
            .http2()
            .timer(TokioTimer::new())
            .max_header_list_size(MAX_HEAD_BYTES as u32)
            .max_concurrent_streams(MAX_STREAMS)
            .max_pending_accept_reset_streams(Some(MAX_STREAMS as usize))
            .keep_alive_interval(Some(self.config.keepalive.interval))
            .keep_alive_timeout(self.config.keepalive.timeout);
        protocol
    }
}

/// Who may call from a browser's page: nobody unless the command line says so.
fn cors(origins: &[String]) -> Result<Option<CorsLayer>, Failure> {
    let mut allowed = Vec::with_capacity(origins.len());
    for origin in origins {
        let value: HeaderValue = origin
            .parse()
            .map_err(|_| Failure::usage(format_args!("--allowed-origins: {origin:?} is no origin")))?;
        allowed.push(value);
    }
    if allowed.is_empty() {
        return Ok(None);
    }
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([header::HeaderName::from_static(REQUEST_ID), header::RETRY_AFTER]);
    Ok(Some(if allowed.iter().any(|origin| origin == "*") {
        layer.allow_origin(tower_http::cors::Any)
    } else {
        layer.allow_origin(allowed)
    }))
}

fn cannot_bind(config: &HttpConfig, error: &io::Error) -> Failure {
    let addresses: Vec<String> = config.addresses.iter().map(ToString::to_string).collect();
    let addresses = addresses.join(", ");
    Failure::new(
        Exit::Bind,
        format_args!(
            "cannot listen on {addresses}: {error}; choose another --port (0 takes a free one) or --host, or say --no-http"
        ),
    )
}
