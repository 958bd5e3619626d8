//! What the HTTP port and the gateway need.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::serve::{Keepalive, ListenConfig, TlsConfig, addresses, listen_config};
use crate::{
    args::{GatewayArgs, HttpArgs, NetworkArgs},
    auth::ApiKeys,
    exit::Failure,
    logging::LogConfig,
};

/// Where and for whom to listen.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// Candidates; the first that can be bound is used.
    pub addresses: Vec<SocketAddr>,
    /// Keys that clients must present; none lets everyone in.
    pub keys: ApiKeys,
    /// TLS, if wanted.
    pub tls: Option<TlsConfig>,
    /// When a silent connection counts as dead.
    pub keepalive: Keepalive,
    /// Largest body in bytes.
    pub max_body_bytes: usize,
    /// Origins whose pages may call from a browser.
    pub allowed_origins: Vec<String>,
    /// Whether there is a page at `/`.
    pub live_page: bool,
}

impl HttpConfig {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Wrong usage.
    pub fn new(args: HttpArgs, network: &NetworkArgs, listen: &ListenConfig) -> Result<Self, Failure> {
        Ok(Self {
            addresses: addresses(network, args.port)?,
            keys: listen.keys.clone(),
            tls: listen.tls.clone(),
            keepalive: listen.keepalive,
            max_body_bytes: args.max_body_bytes.0,
            allowed_origins: args.allowed_origins,
            live_page: !args.disable_live_page,
        })
    }

    /// An open server on a free port of the loopback interface.
    pub fn loopback() -> Self {
        Self {
            addresses: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            keys: ApiKeys::default(),
            tls: None,
            keepalive: Keepalive::default(),
            max_body_bytes: 4 << 20,
            allowed_origins: Vec::new(),
            live_page: true,
        }
    }
}

/// An HTTP front for an engine elsewhere.
#[derive(Debug)]
pub struct GatewayConfig {
    /// The engine.
    pub engine: EngineAddress,
    /// The HTTP server.
    pub http: HttpConfig,
    /// What running requests get to finish when the gateway shuts down.
    pub shutdown_timeout: Duration,
    /// Log lines.
    pub log: LogConfig,
}

/// Where an engine is and how to be let in.
#[derive(Clone)]
pub struct EngineAddress {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub url: String,
    /// The key that it wants.
    pub api_key: Option<String>,
    /// Authority of its certificate, PEM.
    pub tls_ca: Option<Vec<u8>>,
}

impl EngineAddress {
    /// Whether nobody on the way can read what is sent there: by TLS, or because it does not leave the machine.
    pub fn is_private(&self) -> bool {
        let Some(authority) = self.url.strip_prefix("http://") else { return true };
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        let ip = host.trim_matches(['[', ']']).parse::<IpAddr>();
        host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
    }
}

impl std::fmt::Debug for EngineAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineAddress").field("url", &self.url).finish_non_exhaustive()
    }
}

impl GatewayConfig {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Wrong usage.
    pub fn from_args(args: GatewayArgs) -> Result<Self, Failure> {
        if args.log.otlp_endpoint.is_some() {
            return Err(Failure::usage(
                "--otlp-endpoint: lives are traced by the engine; give it to `tidemill serve`",
            ));
        }
        let url = if args.engine.contains("://") { args.engine } else { format!("http://{}", args.engine) };
        if !url.starts_with("http://") && !url.starts_with("https://") {
            return Err(Failure::usage(format_args!(
                "--engine {url:?}: use HOST:PORT, http://HOST:PORT or https://HOST:PORT"
            )));
        }
        let read = |path: std::path::PathBuf| {
            fs::read(&path)
                .map_err(|error| Failure::usage(format_args!("--engine-tls-ca {}: {error}", path.display())))
        };
        let tls_ca = args.engine_tls_ca.map(read).transpose()?;
        if tls_ca.is_some() && url.starts_with("http://") {
            return Err(Failure::usage("--engine-tls-ca needs an engine at https://HOST:PORT"));
        }
        let listen = listen_config(&args.network)?;
        let http = HttpConfig::new(args.http, &args.network, &listen)?;
        let shutdown_timeout = args.network.shutdown_timeout;
        let log = LogConfig::new(args.log.log_format, &args.log.log_level)?;
        Ok(Self {
            engine: EngineAddress { url, api_key: args.engine_api_key, tls_ca },
            http,
            shutdown_timeout,
            log,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_on_the_machine_or_is_encrypted_is_private() {
        let private = |url: &str| EngineAddress { url: url.into(), api_key: None, tls_ca: None }.is_private();
        for url in [
            "https://gpu1:1",
            "http://localhost:1",
            "http://127.0.0.1:1",
            "http://[::1]:1",
            "http://127.1.2.3:1",
        ] {
            assert!(private(url), "{url}");
        }
        for url in ["http://gpu1:1", "http://10.0.0.1:1", "http://[2001:db8::1]:1", "http://0.0.0.0:1"] {
            assert!(!private(url), "{url}");
        }
    }
}
