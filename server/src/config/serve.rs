//! What `tidemill serve` needs.

use std::{
    collections::BTreeMap,
    fs,
    net::{SocketAddr, ToSocketAddrs},
    path::Path,
    time::Duration,
};

use tidemill_engine::{EngineConfig, SchedulingConfig, ids::TenantId, scheduler::Policy};

use super::{HttpConfig, engine_config, lora::lora_config};
use crate::{
    args::{NetworkArgs, PolicyArg, SchedulingArgs, ServeArgs, TenantWeight},
    auth::ApiKeys,
    exit::Failure,
    http::answer::Parsers,
    lives::OtlpEndpoint,
    logging::LogConfig,
};

/// A server to start.
#[derive(Debug)]
pub struct ServeConfig {
    /// The engine behind it.
    pub engine: EngineConfig,
    /// The gRPC server.
    pub grpc: GrpcConfig,
    /// Log lines.
    pub log: LogConfig,
    /// Where traces go, if anywhere.
    pub otlp: Option<OtlpEndpoint>,
    /// The HTTP server, if wanted.
    pub http: Option<HttpConfig>,
}

/// Where and for whom to listen.
#[derive(Debug, Clone)]
pub struct GrpcConfig {
    /// Candidates; the first that can be bound is used.
    pub addresses: Vec<SocketAddr>,
    /// Keys that clients must present; none lets everyone in.
    pub keys: ApiKeys,
    /// TLS, if wanted.
    pub tls: Option<TlsConfig>,
    /// What running requests get to finish when the server shuts down.
    pub shutdown_timeout: Duration,
    /// When a silent connection counts as dead.
    pub keepalive: Keepalive,
    /// How answers are to be read, here or by those who ask what is loaded.
    pub parsers: Parsers,
}

/// When a silent connection counts as dead. What a client held that vanished is free again after both.
#[derive(Debug, Clone, Copy)]
pub struct Keepalive {
    /// A connection that shows no sign of life for this long is asked for one.
    pub interval: Duration,
    /// It is closed when it gives none within this.
    pub timeout: Duration,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { interval: Duration::from_secs(20), timeout: Duration::from_secs(10) }
    }
}

impl GrpcConfig {
    /// An open server on a free port of the loopback interface.
    pub fn loopback() -> Self {
        Self {
            addresses: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            keys: ApiKeys::default(),
            tls: None,
            shutdown_timeout: Duration::from_secs(30),
            keepalive: Keepalive::default(),
            parsers: Parsers::default(),
        }
    }
}

/// Certificates, PEM.
#[derive(Clone)]
pub struct TlsConfig {
    /// The server's chain.
    pub certificate: Vec<u8>,
    /// Its private key.
    pub key: Vec<u8>,
    /// The authority of the clients' certificates.
    pub client_ca: Option<Vec<u8>>,
}

impl std::fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsConfig").field("client_ca", &self.client_ca.is_some()).finish_non_exhaustive()
    }
}

impl ServeConfig {
    /// Checks the arguments.
    ///
    /// # Errors
    /// What is wrong and what to do, as wrong usage.
    pub fn from_args(args: ServeArgs) -> Result<Self, Failure> {
        let mut engine = engine_config(args.model)?;
        engine.served_model_name = args.limits.served_model_name;
        engine.skip_tokenizer_init = args.limits.skip_tokenizer_init;
        engine.max_num_seqs = args.limits.max_num_seqs.map(Into::into);
        engine.swap_space = args.scheduling.swap_space.0;
        engine.scheduling = scheduling_config(args.scheduling)?;
        engine.lora = lora_config(args.lora)?;
        let log = LogConfig::new(args.log.log_format, &args.log.log_level)?;
        let listen = listen_config(&args.network)?;
        let http = (!args.no_http).then(|| HttpConfig::new(args.http, &args.network, &listen)).transpose()?;
        let grpc = GrpcConfig {
            addresses: addresses(&args.network, args.grpc_port)?,
            keys: listen.keys,
            tls: listen.tls,
            shutdown_timeout: args.network.shutdown_timeout,
            keepalive: listen.keepalive,
            parsers: Parsers { tools: args.tool_call_parser, reasoning: args.reasoning_parser },
        };
        Ok(Self { engine, grpc, log, otlp: args.log.otlp_endpoint, http })
    }
}

fn scheduling_config(args: SchedulingArgs) -> Result<SchedulingConfig, Failure> {
    let caching = !args.no_enable_prefix_caching;
    if args.enable_kv_cache_events && !caching {
        return Err(Failure::usage(
            "--enable-kv-cache-events has nothing to tell with --no-enable-prefix-caching; leave one of them out",
        ));
    }
    if args.swap_space.0 > 0 && !caching {
        return Err(Failure::usage(
            "--swap-space keeps blocks of the prefix cache, and --no-enable-prefix-caching turns that off; leave one of them out",
        ));
    }
    Ok(SchedulingConfig {
        policy: match args.scheduling_policy {
            PolicyArg::Fcfs => Policy::Fcfs,
            PolicyArg::Priority => Policy::Priority,
            PolicyArg::Fair => Policy::Fair,
        },
        tenant_weights: tenant_weights(args.tenant_weight, args.scheduling_policy)?,
        enable_prefix_caching: caching,
        enable_kv_cache_events: args.enable_kv_cache_events,
        long_prefill_token_threshold: args.long_prefill_token_threshold.map(Into::into),
        target_itl: args.target_itl_ms,
        max_num_queued_reqs: args.max_num_queued_reqs.into(),
        max_num_queued_tokens: args.max_num_queued_tokens.map(Into::into),
        max_queue_time: args.max_queue_time,
        max_stream_buffer: args.max_stream_buffer.into(),
        slow_reader_timeout: args.slow_reader_timeout.0,
    })
}

fn tenant_weights(args: Vec<TenantWeight>, policy: PolicyArg) -> Result<BTreeMap<TenantId, u32>, Failure> {
    if !args.is_empty() && policy != PolicyArg::Fair {
        return Err(Failure::usage("--tenant-weight counts only with --scheduling-policy fair"));
    }
    let mut weights = BTreeMap::new();
    for TenantWeight { tenant, weight } in args {
        if weights.insert(tenant.clone(), weight).is_some() {
            return Err(Failure::usage(format_args!("--tenant-weight names {:?} twice", tenant.as_str())));
        }
    }
    Ok(weights)
}

/// What all ports of a process share.
#[derive(Debug, Clone)]
pub struct ListenConfig {
    /// Keys that clients must present.
    pub keys: ApiKeys,
    /// TLS, if wanted.
    pub tls: Option<TlsConfig>,
    /// When a silent connection counts as dead.
    pub keepalive: Keepalive,
}

/// The credentials of the process's ports.
///
/// # Errors
/// Wrong usage: among it an address that strangers can reach.
pub fn listen_config(args: &NetworkArgs) -> Result<ListenConfig, Failure> {
    let keys = ApiKeys::new(args.api_key.clone())?;
    let tls = tls_config(args.tls_cert.as_deref(), args.tls_key.as_deref(), args.tls_client_ca.as_deref())?;
    let loopback = addresses(args, 0)?.iter().all(|address| address.ip().is_loopback());
    let closed = !keys.is_empty() || tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
    if !loopback && !closed && !args.insecure_bind {
        return Err(Failure::usage(format_args!(
            "--host {:?} can be reached from other machines, and nothing keeps strangers out; set --api-key (or \
             TIDEMILL_API_KEY) or --tls-client-ca, or say --insecure-bind if the network is trusted",
            args.host
        )));
    }
    let keepalive = Keepalive { interval: args.keepalive_interval, timeout: args.keepalive_timeout };
    Ok(ListenConfig { keys, tls, keepalive })
}

/// Candidates to listen on.
///
/// # Errors
/// Wrong usage for a host that is none.
pub fn addresses(args: &NetworkArgs, port: u16) -> Result<Vec<SocketAddr>, Failure> {
    let mut addresses: Vec<SocketAddr> = (args.host.as_str(), port)
        .to_socket_addrs()
        .map_err(|error| Failure::usage(format_args!("--host {:?} cannot be resolved: {error}", args.host)))?
        .collect();
    // `localhost` has two; clients that write 127.0.0.1 are more than those that write ::1.
    addresses.sort_by_key(SocketAddr::is_ipv6);
    Ok(addresses)
}

fn tls_config(
    cert: Option<&Path>,
    key: Option<&Path>,
    ca: Option<&Path>,
) -> Result<Option<TlsConfig>, Failure> {
    let read = |option: &str, path: &Path| {
        fs::read(path).map_err(|error| Failure::usage(format_args!("{option} {}: {error}", path.display())))
    };
    match (cert, key, ca) {
        (None, None, None) => Ok(None),
        (Some(cert), Some(key), ca) => Ok(Some(TlsConfig {
            certificate: read("--tls-cert", cert)?,
            key: read("--tls-key", key)?,
            client_ca: ca.map(|ca| read("--tls-client-ca", ca)).transpose()?,
        })),
        _ => Err(Failure::usage("TLS needs both --tls-cert and --tls-key; --tls-client-ca needs them too")),
    }
}
