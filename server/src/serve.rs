//! `tidemill serve`: from the bound port to the exit code.

use std::{
    io::{self, Write},
    sync::Arc,
    time::Duration,
};

use tidemill_engine::{EngineConfig, EngineHandle, StopReason};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    client::LocalEngine,
    config::{GrpcConfig, HttpConfig},
    exit::{Exit, Failure},
    grpc::Server,
    http::HttpServer,
    lives::{Lives, OtlpEndpoint},
    loading,
};

/// What clients get to take the last messages when the server ends.
pub const FLUSH: Duration = Duration::from_secs(5);

/// Where to listen and how.
#[derive(Debug)]
pub struct Ports {
    /// gRPC.
    pub grpc: GrpcConfig,
    /// HTTP, if wanted.
    pub http: Option<HttpConfig>,
}

/// The servers of this process.
#[derive(Debug)]
struct Fronts {
    grpc: Server,
    http: Option<HttpServer>,
}

impl Fronts {
    /// Ends all streams and closes the ports; connections get `flush` to take what has been written.
    async fn stop(self, flush: Duration) {
        let http = async {
            if let Some(http) = self.http {
                http.stop(flush).await;
            }
        };
        tokio::join!(self.grpc.stop(flush), http);
    }
}

/// Serves until a signal or the engine's death.
///
/// # Errors
/// Each with its exit code.
pub async fn serve(
    mut engine: EngineConfig,
    ports: Ports,
    otlp: Option<OtlpEndpoint>,
) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let (lives, sender) = Lives::start(otlp.as_ref())?;
    engine.lives = Some(sender);
    let Ports { grpc, http } = ports;
    let server = Server::bind(&grpc).await?;
    let http = match &http {
        Some(http) => {
            let engine = LocalEngine::new(server.lifecycle(), grpc.parsers);
            Some(HttpServer::bind(http, Arc::new(engine)).await?)
        }
        None => None,
    };
    let server = Fronts { grpc: server, http };
    if grpc.tls.is_none() && !grpc.keys.is_empty() && !server.grpc.address().ip().is_loopback() {
        tracing::warn!(
            "API keys travel unencrypted; set --tls-cert and --tls-key, or let a proxy in front do TLS"
        );
    }
    tracing::info!(address = %server.grpc.address(), "bound; loading the model");
    let engine = tokio::select! {
        engine = loading::load(engine) => engine?,
        name = signals.next() => {
            tracing::info!(signal = name, "ended while loading");
            server.stop(FLUSH).await;
            return Ok(());
        }
    };
    server.grpc.ready(engine.handle()).await;
    announce(&server, &engine.handle());
    let end = until_the_end(&server.grpc, &engine.handle(), &mut signals, grpc.shutdown_timeout).await;
    match &end {
        Err(failure) if failure.exit == Exit::Interrupted => std::mem::forget(engine),
        Err(failure) if failure.exit == Exit::DeviceLost => {
            server.stop(FLUSH).await;
            // To give a lost device its memory back may take for ever.
            std::mem::forget(engine);
        }
        _ => {
            server.stop(FLUSH).await;
            // A step that hangs holds its runner up for ever.
            let dropped = tokio::task::spawn_blocking(move || drop(engine));
            drop(tokio::time::timeout(FLUSH, dropped).await);
        }
    }
    if !matches!(&end, Err(failure) if failure.exit == Exit::Interrupted) {
        lives.finish(FLUSH).await;
    }
    end
}

/// Waits for a signal and drains; an engine that dies ends the server too.
async fn until_the_end(
    server: &Server,
    engine: &EngineHandle,
    signals: &mut Signals,
    grace: Duration,
) -> Result<(), Failure> {
    tokio::select! {
        reason = engine.stopped() => return Err(died(&reason)),
        name = signals.next() => tracing::info!(signal = name, grace_seconds = grace.as_secs_f64(), "draining"),
    }
    server.refuse_new_requests().await;
    tokio::select! {
        drained = engine.drain(grace) => match drained {
            Ok(drained) => {
                tracing::info!(finished = drained.finished, cut_off = drained.cut_off, "drained");
                Ok(())
            }
            Err(_) => Err(died(&engine.stopped().await)),
        },
        name = signals.next() => Err(Failure::new(
            Exit::Interrupted,
            format_args!("a second signal ({name}) ended the server before its requests were done"),
        )),
    }
}

/// An end that nobody asked for.
fn died(reason: &StopReason) -> Failure {
    match reason {
        StopReason::Stopped(reason) => Failure::new(
            Exit::EngineDied,
            format_args!("the engine died: {reason}; restart the server, and report this"),
        ),
        StopReason::DeviceLost(reason) => Failure::new(
            Exit::DeviceLost,
            format_args!(
                "the device is lost: {reason}; restart the server, on another device if it happens again"
            ),
        ),
    }
}

/// Says on stdout where the server listens, for scripts, and in the log what it serves.
fn announce(server: &Fronts, engine: &EngineHandle) {
    let info = engine.info();
    tracing::info!(
        model = info.served_model_name,
        device = info.device,
        dtype = info.dtype,
        max_model_len = info.max_model_len,
        kv_blocks = info.num_kv_blocks,
        block_size = info.block_size,
        max_num_seqs = info.max_num_seqs,
        "ready"
    );
    let mut stdout = io::stdout();
    // A closed stdout is no reason not to serve.
    drop(writeln!(stdout, "listening on {}", server.grpc.address()));
    if let Some(http) = &server.http {
        drop(writeln!(stdout, "listening on {}", http.url()));
    }
    drop(stdout.flush());
}

/// SIGTERM and SIGINT.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From now on the two no longer end the process by themselves.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn new() -> Result<Self, Failure> {
        let listen = |kind| {
            signal(kind).map_err(|error| Failure::runtime(format_args!("cannot listen to signals: {error}")))
        };
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// The name of the next signal.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use tidemill_engine::{
        Engine, EngineOptions, LoadError,
        model::files::ModelSource,
        request::{GenerateRequest, Prompt},
        runner::{DeviceLost, Runner, RunnerError, RunnerThread},
        scheduler::{StepOutput, StepPlan},
    };

    use super::*;

    fn engine() -> Engine {
        let mut config = EngineConfig::new(ModelSource::Builtin);
        config.max_num_seqs = Some(1);
        config.threads = Some(1);
        Engine::start(config, |_| ()).unwrap()
    }

    #[tokio::test]
    async fn an_engine_that_dies_ends_the_server_with_its_own_code() {
        let engine = engine();
        let server = Server::bind(&GrpcConfig::loopback()).await.unwrap();
        let (handle, mut signals) = (engine.handle(), Signals::new().unwrap());
        server.ready(engine.handle()).await;
        let dying = tokio::task::spawn_blocking(|| drop(engine));
        let end = until_the_end(&server, &handle, &mut signals, Duration::ZERO).await;
        assert_eq!(end.unwrap_err().exit, Exit::EngineDied);
        dying.await.unwrap();
    }

    /// A device that is lost with its first step.
    struct Lost;

    impl Runner for Lost {
        fn launch(&mut self, _: &StepPlan) -> Result<(), RunnerError> {
            Err(DeviceLost("fell off the bus".into()).into())
        }

        fn wait(&mut self) -> Result<StepOutput, RunnerError> {
            unreachable!("nothing is ever launched")
        }

        fn is_done(&mut self) -> bool {
            false
        }
    }

    #[tokio::test]
    async fn a_lost_device_ends_the_server_with_a_code_of_its_own() {
        let like = engine().handle();
        let (runner, ()) = RunnerThread::start(|| Ok::<_, LoadError>((Lost, ()))).unwrap();
        let options = EngineOptions { look_ahead: true, ..EngineOptions::default() };
        let engine = Engine::with_runner(runner, like.info().clone(), like.text().clone(), options).unwrap();
        let server = Server::bind(&GrpcConfig::loopback()).await.unwrap();
        let (handle, mut signals) = (engine.handle(), Signals::new().unwrap());
        server.ready(engine.handle()).await;
        let request = handle.validate(GenerateRequest::new(Prompt::Text("Once".into()))).unwrap();
        let mut generation = handle.submit(request).unwrap();
        let end = until_the_end(&server, &handle, &mut signals, Duration::ZERO).await.unwrap_err();
        assert_eq!(end.exit, Exit::DeviceLost);
        assert!(end.message.contains("fell off the bus"), "{end}");
        let error = generation.next().await.unwrap().unwrap_err();
        assert_eq!(Failure::from(error).exit, Exit::DeviceLost, "`run` ends the same way");
    }
}
