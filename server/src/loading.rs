//! Loading a model off the network's threads, with a progress bar for people.

use std::thread;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
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
        let engine = Engine::start(config, move |Progress::Layers { done, total }| progress.at(done, total));
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
        if let Ok(style) = ProgressStyle::with_template("loading {bar:32} {pos}/{len} layers {elapsed}") {
            bar.set_style(style);
        }
        Self(bar)
    }

    fn at(&self, done: usize, total: usize) {
        self.0.set_length(total as u64);
        self.0.set_position(done as u64);
    }

    fn clear(&self) {
        self.0.finish_and_clear();
    }
}
