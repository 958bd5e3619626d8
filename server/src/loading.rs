//! Loading a model off the network's threads, with a progress bar for people.

use std::{fmt, thread};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use tidemill_engine::{Engine, EngineConfig, Progress};
use tokio::sync::oneshot;

use crate::exit::{Exit, Failure};

/// Starts an engine. Giving this future up leaves a thread that loads in vain; the program is about to end then.
///
/// # Errors
/// What is wrong with the model or the options.
pub async fn load(config: EngineConfig) -> Result<Engine, Failure> {
    let (loaded, result) = oneshot::channel();
    let bar = LoadingBar::new();
    let body = move || {
        let progress = bar.clone();
        let engine = Engine::start(config, move |reached| progress.at(reached));
        bar.clear();
        // Nobody waits for an engine that was given up.
        drop(loaded.send(engine));
    };
    thread::Builder::new().name("tidemill-load".into()).spawn(body).map_err(Failure::runtime)?;
    let engine =
        result.await.map_err(|_| Failure::new(Exit::Model, "loading the model panicked; this is a bug"))?;
    Ok(engine?)
}

/// A bar on stderr, if that is a terminal.
#[derive(Debug, Clone)]
struct LoadingBar(ProgressBar);

impl LoadingBar {
    fn new() -> Self {
        // Hidden by itself where stderr is no terminal.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let template = "loading {bar:32} {decimal_bytes}/{decimal_total_bytes} {rate} {msg} {elapsed}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            // The average: a rate of the moment jumps between what was in the page cache and what was not.
            let rate = |state: &ProgressState, to: &mut dyn fmt::Write| {
                let seconds = state.elapsed().as_secs_f64().max(1e-3);
                let _ = write!(to, "{:.2} GB/s", state.pos() as f64 / 1e9 / seconds);
            };
            bar.set_style(style.with_key("rate", rate));
        }
        Self(bar)
    }

    fn at(&self, reached: Progress) {
        match reached {
            Progress::Layers { done, total } => self.0.set_message(format!("{done}/{total} layers")),
            Progress::Bytes { done, total } => {
                self.0.set_length(total);
                self.0.set_position(done);
            }
        }
    }

    fn clear(&self) {
        self.0.finish_and_clear();
    }
}
