//! The connection: made when it is first needed, and again whenever it was lost.

use std::time::Duration;

use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{self, Certificate, ClientTlsConfig, Endpoint},
};

use crate::{
    config::EngineAddress,
    exit::{Failure, with_causes},
};

/// What a connection may take to be made. Requests that need it wait as long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// An engine that shows no sign of life for this long is asked for one (HTTP/2 PING), streams or not.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// What it may take to answer. Both together are how long requests may hang on a machine that vanished without a word.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// What an engine may send on one stream, and on all of them, before it is told that it was read: hundreds of streams flow at once, and a
/// vocabulary has megabytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// Carries calls with the gateway's key.
pub type Channel = InterceptedService<transport::Channel, Key>;

/// Puts the engine's key on every call.
#[derive(Clone)]
pub struct Key(Option<MetadataValue<Ascii>>);

impl Interceptor for Key {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(key) = &self.0 {
            request.metadata_mut().insert("authorization", key.clone());
        }
        Ok(request)
    }
}

/// A channel to this address.
///
/// # Errors
/// Wrong usage when the address, the key or the certificate cannot be used.
pub fn connect(address: &EngineAddress) -> Result<Channel, Failure> {
    let wrong = |error: transport::Error| {
        Failure::usage(format_args!("--engine {:?} cannot be used: {}", address.url, with_causes(&error)))
    };
    let mut endpoint = Endpoint::from_shared(address.url.clone())
        .map_err(wrong)?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    if endpoint.uri().authority().is_none_or(|authority| authority.host().is_empty()) {
        return Err(Failure::usage(format_args!("--engine {:?} names no host; use HOST:PORT", address.url)));
    }
    if address.url.starts_with("https://") {
        let tls = match &address.tls_ca {
            Some(authority) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        endpoint = endpoint.tls_config(tls).map_err(wrong)?;
    }
    Ok(InterceptedService::new(endpoint.connect_lazy(), Key(key(address)?)))
}

fn key(address: &EngineAddress) -> Result<Option<MetadataValue<Ascii>>, Failure> {
    let Some(key) = &address.api_key else { return Ok(None) };
    let wrong =
        || Failure::usage("--engine-api-key: a key must be printable ASCII without spaces, and not empty");
    if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(wrong());
    }
    let mut value: MetadataValue<Ascii> = format!("Bearer {key}").parse().map_err(|_| wrong())?;
    value.set_sensitive(true);
    Ok(Some(value))
}
