//! Where the server is between its start and its end, and what health checks say about it.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tidemill_engine::EngineHandle;
use tidemill_proto::{
    v1::{control_server::ControlServer, inference_server::InferenceServer},
    vllm::grpc::engine::vllm_engine_server::VllmEngineServer,
};
use tokio::sync::{Mutex, watch};
use tonic::{Status, server::NamedService};
use tonic_health::{ServingStatus, server::HealthReporter};

use super::{control::ControlService, inference::InferenceService, vllm::VllmService};

/// The stages of a server's life, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The port is open, the model is not there yet.
    Loading,
    /// Requests are served.
    Ready,
    /// The running requests may finish; no new ones.
    Draining,
    /// Streams end.
    Stopped,
}

/// The stage and the engine; shared by all handlers.
#[derive(Debug)]
pub struct Lifecycle {
    engine: OnceLock<EngineHandle>,
    phase: watch::Sender<Phase>,
    /// The engine shows no sign of life.
    stalled: AtomicBool,
    /// Locked while the statuses are written, so that the last writer knows the last state.
    health: Mutex<HealthReporter>,
}

/// Services whose health is reported; "" is the server as a whole.
const SERVICES: [&str; 4] = [
    "",
    <InferenceServer<InferenceService> as NamedService>::NAME,
    <ControlServer<ControlService> as NamedService>::NAME,
    <VllmEngineServer<VllmService> as NamedService>::NAME,
];

/// An engine that shows no sign of life for so long while it has work is not healthy. Far more than the longest step.
const STALL: Duration = Duration::from_secs(60);

impl Lifecycle {
    /// A server that is loading.
    pub async fn new(health: HealthReporter) -> Arc<Self> {
        let lifecycle = Self {
            engine: OnceLock::new(),
            phase: watch::Sender::new(Phase::Loading),
            stalled: AtomicBool::new(false),
            health: Mutex::new(health),
        };
        lifecycle.report().await;
        Arc::new(lifecycle)
    }

    /// The model is there: requests are served from now on. Only the first engine counts.
    pub async fn ready(self: &Arc<Self>, engine: EngineHandle) {
        if self.engine.set(engine.clone()).is_ok() {
            self.enter(Phase::Ready).await;
            tokio::spawn(self.clone().watch_engine(engine));
        }
    }

    /// Goes on to a later stage; an earlier one is ignored.
    pub async fn enter(&self, phase: Phase) {
        let advanced = self.phase.send_if_modified(|now| {
            let later = phase > *now;
            if later {
                *now = phase;
            }
            later
        });
        if advanced {
            tracing::info!(?phase, "server");
            self.report().await;
        }
    }

    /// The stage now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Resolves when streams that have no end of their own must end.
    pub async fn stopped(&self) {
        let mut phase = self.phase.subscribe();
        // The sender is ours, so it is there.
        drop(phase.wait_for(|phase| *phase == Phase::Stopped).await);
    }

    /// The engine, once there is one.
    ///
    /// # Errors
    /// UNAVAILABLE while loading.
    pub fn engine(&self) -> Result<&EngineHandle, Status> {
        self.engine.get().ok_or_else(|| Status::unavailable("the model is loading; try again in a moment"))
    }

    /// Whether requests are served: there is an engine, it takes new ones, and it shows signs of life.
    pub fn is_healthy(&self) -> bool {
        self.phase() == Phase::Ready && !self.stalled.load(Relaxed)
    }

    /// Tells health checks how things stand.
    async fn report(&self) {
        let mut health = self.health.lock().await;
        let status = if self.is_healthy() { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in SERVICES {
            health.set_service_status(service, status).await;
            if self.phase() == Phase::Stopped {
                // Those who watch have been told; now their streams end, which would keep their connections open. Those who
                // still ask get the same answer.
                health.clear_service_status(service).await;
                health.set_service_status(service, status).await;
            }
        }
    }

    /// Keeps health honest while the engine runs: not healthy when it hangs or has died.
    async fn watch_engine(self: Arc<Self>, engine: EngineHandle) {
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                reason = engine.stopped() => {
                    tracing::debug!(%reason, "the engine has ended");
                    self.enter(Phase::Stopped).await;
                    return;
                }
                _ = ticks.tick() => {
                    let age = engine.stats().heartbeat_age;
                    let stalled = age > STALL;
                    if self.stalled.swap(stalled, Relaxed) != stalled {
                        tracing::error!(stalled, heartbeat_age_seconds = age.as_secs(), "the engine's steps");
                        self.report().await;
                    }
                }
            }
        }
    }
}
