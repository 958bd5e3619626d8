//! What `tidemill serve` needs.

use std::{
    collections::BTreeMap,
    fs,
    net::{SocketAddr, ToSocketAddrs},
    path::Path,
    time::Duration,
};

use tidemill_engine::{EngineConfig, SchedulingConfig, ids::TenantId, scheduler::Policy};

use super::engine_config;
use crate::{
    args::{NetworkArgs, PolicyArg, SchedulingArgs, ServeArgs, TenantWeight},
    exit::Failure,
    grpc::auth::ApiKeys,
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
}

impl GrpcConfig {
    /// An open server on a free port of the loopback interface.
    pub fn loopback() -> Self {
        Self {
            addresses: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            keys: ApiKeys::default(),
            tls: None,
            shutdown_timeout: Duration::from_secs(30),
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
        engine.max_num_seqs = args.limits.max_num_seqs.map(Into::into);
        engine.swap_space = args.scheduling.swap_space.0;
        engine.scheduling = scheduling_config(args.scheduling)?;
        let log = LogConfig::new(args.log.log_format, &args.log.log_level)?;
        let grpc = grpc_config(args.network, args.limits.shutdown_timeout)?;
        Ok(Self { engine, grpc, log, otlp: args.log.otlp_endpoint })
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

fn grpc_config(args: NetworkArgs, shutdown_timeout: Duration) -> Result<GrpcConfig, Failure> {
    let keys = ApiKeys::new(args.api_key)?;
    let tls = tls_config(args.tls_cert.as_deref(), args.tls_key.as_deref(), args.tls_client_ca.as_deref())?;
    let mut addresses: Vec<SocketAddr> = (args.host.as_str(), args.grpc_port)
        .to_socket_addrs()
        .map_err(|error| Failure::usage(format_args!("--host {:?} cannot be resolved: {error}", args.host)))?
        .collect();
    // `localhost` has two; clients that write 127.0.0.1 are more than those that write ::1.
    addresses.sort_by_key(SocketAddr::is_ipv6);
    let loopback = addresses.iter().all(|address| address.ip().is_loopback());
    let closed = !keys.is_empty() || tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
    if !loopback && !closed && !args.insecure_bind {
        return Err(Failure::usage(format_args!(
            "--host {:?} can be reached from other machines, and nothing keeps strangers out; set --api-key (or \
             TIDEMILL_API_KEY) or --tls-client-ca, or say --insecure-bind if the network is trusted",
            args.host
        )));
    }
    Ok(GrpcConfig { addresses, keys, tls, shutdown_timeout })
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
