//! Lives of ended requests: from the engine to the log and, if wanted, to an OpenTelemetry collector.
//!
//! The engine hands a life over through a bounded channel and never waits. One task writes log lines; another, behind a bounded queue of its
//! own, exports spans, so that a collector that hangs holds up neither requests nor log lines.

mod export;
mod spans;
mod stages;

use std::time::{Duration, SystemTime};

use async_channel::{Receiver, Sender};
use tidemill_engine::explain::{EndedLife, Life};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout},
};

pub use export::OtlpEndpoint;

use self::{
    export::SpanQueue,
    stages::{StageKind, stages, time_in},
};
use crate::{
    convert::{code, code_name, finish_reason_name},
    exit::Failure,
};

/// Lives that may wait for the log. More than end between two turns of the task.
const CAPACITY: usize = 4096;

/// The tasks that take lives from an engine.
#[derive(Debug)]
pub struct Lives {
    stop: oneshot::Sender<()>,
    log: JoinHandle<()>,
    export: Option<JoinHandle<()>>,
}

impl Lives {
    /// Starts the tasks; lives that go into the sender are logged, and exported to the endpoint.
    ///
    /// # Errors
    /// Wrong usage when the endpoint is none.
    pub fn start(otlp: Option<&OtlpEndpoint>) -> Result<(Self, Sender<EndedLife>), Failure> {
        let (sender, lives) = async_channel::bounded(CAPACITY);
        let (stop, stopped) = oneshot::channel();
        let (queue, export) = otlp.map(SpanQueue::start).transpose()?.unzip();
        let log = tokio::spawn(record(lives, queue, stopped));
        Ok((Self { stop, log, export }, sender))
    }

    /// Logs and exports what has ended until now. Gives up after `patience`.
    pub async fn finish(self, patience: Duration) {
        // Fails when the task has ended: the engine is gone.
        let _ = self.stop.send(());
        let deadline = Instant::now() + patience;
        for task in [Some(self.log), self.export].into_iter().flatten() {
            let left = deadline.saturating_duration_since(Instant::now());
            if timeout(left, task).await.is_err() {
                tracing::warn!("not all traces could be exported before the end");
            }
        }
    }
}

/// Takes lives until the engine is gone or the server ends.
async fn record(
    lives: Receiver<EndedLife>,
    mut spans: Option<SpanQueue>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut take = |life: EndedLife| {
        log(&life);
        if let Some(spans) = &mut spans {
            spans.push(&life);
        }
    };
    loop {
        tokio::select! {
            life = lives.recv() => match life {
                Ok(life) => take(life),
                Err(_) => return,
            },
            _ = &mut stopped => break,
        }
    }
    while let Ok(life) = lives.try_recv() {
        take(life);
    }
}

/// The line of a request that has ended. Of several completions, times are those of the longest.
fn log(life: &EndedLife) {
    let explanation = &life.explanation;
    let stages = stages(&explanation.life);
    let ms = |duration: Duration| duration.as_micros() as f64 / 1e3;
    let time = |kind| Some(time_in(&stages, kind)).filter(|time| !time.is_zero()).map(ms);
    tracing::info!(
        request_id = ?explanation.id.as_str(),
        tenant = ?explanation.tenant.as_str(),
        outcome = outcome(life),
        prompt_tokens = explanation.prompt_tokens,
        cached_tokens = explanation.cached_tokens,
        completion_tokens = explanation.completion_tokens,
        preemptions = explanation.num_preemptions,
        queue_ms = time(StageKind::Queue),
        prefill_ms = time(StageKind::Prefill),
        decode_ms = time(StageKind::Decode),
        preempted_ms = time(StageKind::Preempted),
        parked_ms = time(StageKind::Parked),
        duration_ms = ms(duration(life)),
        "request"
    );
}

/// How a request's completions ended, in order.
fn outcome(life: &EndedLife) -> String {
    let ends = life.explanation.life.iter().filter_map(|event| match event.what {
        Life::Finished(reason) => Some(finish_reason_name(reason)),
        Life::Failed(error) => Some(code_name(code(error))),
        Life::Dropped => Some("dropped"),
        _ => None,
    });
    ends.collect::<Vec<_>>().join(",")
}

/// From submission to the last event.
fn duration(life: &EndedLife) -> Duration {
    life.explanation.life.iter().map(|event| event.at).max().unwrap_or_default()
}

/// The submission by the calendar.
fn submitted(life: &EndedLife) -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(life.submitted.elapsed()).unwrap_or(now)
}
