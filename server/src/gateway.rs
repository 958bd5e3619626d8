//! `tidemill gateway`: the HTTP front in a process of its own, before an engine that is reached over gRPC.

use std::{
    io::{self, Write},
    sync::Arc,
    time::Duration,
};

use crate::{
    client::RemoteEngine,
    config::{EngineAddress, HttpConfig},
    exit::{Exit, Failure},
    http::HttpServer,
    serve::{FLUSH, Signals},
};

/// Serves until a signal. The engine may come and go.
///
/// # Errors
/// Each with its exit code.
pub async fn gateway(address: EngineAddress, http: HttpConfig, grace: Duration) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let engine = Arc::new(RemoteEngine::new(&address)?);
    let server = HttpServer::bind(&http, engine.clone()).await?;
    warn_of_open_keys(&address, &http, &server);
    tracing::info!(engine = address.url, "looking for the engine");
    let mut stdout = io::stdout();
    // A closed stdout is no reason not to serve.
    drop(writeln!(stdout, "listening on {}", server.url()));
    drop(stdout.flush());
    let name = signals.next().await;
    tracing::info!(signal = name, grace_seconds = grace.as_secs_f64(), "draining");
    engine.refuse_new_requests();
    tokio::select! {
        cut_off = engine.drained(grace) => tracing::info!(cut_off, "drained"),
        name = signals.next() => {
            return Err(Failure::new(
                Exit::Interrupted,
                format_args!("a second signal ({name}) ended the gateway before its requests were done"),
            ));
        }
    }
    server.stop(FLUSH).await;
    Ok(())
}

/// Keys that others on the network can read are worth a word, on either side.
fn warn_of_open_keys(engine: &EngineAddress, http: &HttpConfig, server: &HttpServer) {
    if http.tls.is_none() && !http.keys.is_empty() && !server.address().ip().is_loopback() {
        tracing::warn!(
            "API keys travel unencrypted; set --tls-cert and --tls-key, or let a proxy in front do TLS"
        );
    }
    if engine.api_key.is_some() && !engine.is_private() {
        tracing::warn!("the engine's key travels unencrypted; reach the engine by https://HOST:PORT");
    }
}
