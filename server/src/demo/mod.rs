//! The demonstration: the real server, and a real client that talks to it over TCP.

mod prompts;
mod report;
mod screen;
mod streams;

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use tidemill_engine::{EngineConfig, model::files::ModelSource};
use tidemill_proto::v1::{
    GetModelRequest, Stats, control_client::ControlClient, inference_client::InferenceClient,
};
use tokio::sync::mpsc;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use self::{
    prompts::PROMPTS,
    report::{Findings, ending, receipt},
    screen::Screen,
    streams::{Abort, Event, Timing},
};
use crate::{
    args::user_cache, config::GrpcConfig, exit::Exit, exit::Failure, grpc::Server, loading, serve::Signals,
    terminal::Style,
};

/// The endless stream is aborted when it has given so many tokens.
const ABORT_AFTER: usize = 64;
/// What the server gets to close its connections at the end.
const FLUSH: Duration = Duration::from_secs(1);

const NEXT_STEPS: &str = "
  tidemill run \"What is prefill?\"   one prompt on the command line
  tidemill serve                    gRPC on 127.0.0.1:50051; HTTP and a live page on 127.0.0.1:8000
  tidemill serve --model DIR        the same with a model from the hub
  tidemill serve --help             every option, with examples";

/// Shows what Tidemill does, within seconds.
///
/// # Errors
/// When anything is not as it should be.
pub async fn demo(color: bool) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    tokio::select! {
        result = show(Style::of_stdout(color)) => result,
        name = signals.next() => Err(Failure::new(Exit::Interrupted, format_args!("interrupted by {name}"))),
    }
}

async fn show(style: Style) -> Result<(), Failure> {
    let version = env!("CARGO_PKG_VERSION");
    say(&style.bold(&format!("Tidemill {version}: an LLM inference engine in Rust")))?;
    let started = Instant::now();
    let server = Server::bind(&GrpcConfig::loopback()).await?;
    let config = EngineConfig { kernel_cache: user_cache(), ..EngineConfig::new(ModelSource::Builtin) };
    let engine = loading::load(config).await?;
    server.ready(engine.handle()).await;
    let loaded = started.elapsed();
    let channel = connect(&server).await?;
    describe(&channel, &server, loaded).await?;
    let mut show = Show::new(style, channel);
    show.run().await;
    let last = show.settle().await.map_err(Failure::runtime)?;
    show.conclude(&last)?;
    drop(show);
    server.stop(FLUSH).await;
    drop(engine);
    say(&format!("\n{}{NEXT_STEPS}", style.bold("Next steps")))
}

/// A line on stdout. A reader that goes away early ends the demonstration.
fn say(line: &str) -> Result<(), Failure> {
    writeln!(io::stdout(), "{line}").map_err(|error| Failure::runtime(format_args!("stdout: {error}")))
}

async fn connect(server: &Server) -> Result<Channel, Failure> {
    let endpoint = Endpoint::from_shared(format!("http://{}", server.address())).map_err(Failure::runtime)?;
    endpoint.tcp_nodelay(true).connect().await.map_err(Failure::runtime)
}

async fn describe(channel: &Channel, server: &Server, loaded: Duration) -> Result<(), Failure> {
    let mut client = InferenceClient::new(channel.clone());
    let model = client.get_model(GetModelRequest {}).await.map_err(Failure::runtime)?.into_inner();
    say(&format!(
        "\nThe built-in model: {}, {:.1} M parameters in {} on\n{}; loaded in {:.2} s. It is tiny, and here to\nshow \
         the engine, not to be right.\n\ngRPC server on {}; {} chat prompts stream at once:\n",
        model.served_model_name,
        model.num_parameters as f64 / 1e6,
        model.dtype,
        model.device,
        loaded.as_secs_f64(),
        server.address(),
        PROMPTS.len(),
    ))
}

/// The streams under way and what is known about them.
struct Show {
    style: Style,
    inference: InferenceClient<Channel>,
    control: ControlClient<Channel>,
    outcomes: Vec<Option<Result<Timing, Status>>>,
    abort: Option<Result<Abort, Status>>,
    wall: Duration,
}

impl Show {
    fn new(style: Style, channel: Channel) -> Self {
        Self {
            style,
            inference: InferenceClient::new(channel.clone()),
            control: ControlClient::new(channel),
            outcomes: PROMPTS.iter().map(|_| None).collect(),
            abort: None,
            wall: Duration::ZERO,
        }
    }

    /// Starts all streams and shows them until the last has ended.
    async fn run(&mut self) {
        let mut screen = Screen::new(self.style, &PROMPTS);
        let (events, mut news) = mpsc::unbounded_channel();
        let started = Instant::now();
        for (index, prompt) in PROMPTS.iter().enumerate() {
            tokio::spawn(streams::follow(self.inference.clone(), index, prompt.request(), events.clone()));
        }
        let mut abort_events = Some(events);
        while let Some(event) = news.recv().await {
            match event {
                Event::Text { index, text, tokens } => {
                    screen.text(index, &text, tokens);
                    let due = PROMPTS[index].endless && tokens >= ABORT_AFTER;
                    // Taking the sender makes the loop end with the last stream.
                    if let Some(events) = abort_events.take_if(|_| due) {
                        tokio::spawn(streams::abort(
                            self.control.clone(),
                            PROMPTS[index].label.into(),
                            events,
                        ));
                    }
                }
                Event::Done { index, outcome } => {
                    let remark = match &outcome {
                        Ok(timing) => format!("{}, {} tokens", ending(timing.finish), timing.tokens),
                        Err(status) => format!("failed: {}", status.message()),
                    };
                    screen.done(index, &remark);
                    self.outcomes[index] = Some(outcome);
                    // An endless stream that failed will never be aborted.
                    abort_events.take_if(|_| PROMPTS[index].endless);
                }
                Event::Aborted(abort) => {
                    if let Ok(abort) = abort.as_ref() {
                        let [what, freed] = receipt(abort);
                        screen.say(&format!("  {} {what}", self.style.bold("abort    ")));
                        screen.say(&format!("            {freed}"));
                    }
                    self.abort = Some(*abort);
                }
            }
        }
        self.wall = started.elapsed();
        screen.close();
    }

    /// The engine's statistics when it has come to rest.
    async fn settle(&mut self) -> Result<Stats, Status> {
        let patience = Instant::now() + Duration::from_secs(2);
        loop {
            let stats = streams::stats(&mut self.control).await?;
            let busy = stats.num_requests_running + stats.num_requests_waiting + stats.kv_blocks_owned > 0;
            if !busy || Instant::now() > patience {
                return Ok(stats);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Prints the table and judges.
    fn conclude(&self, last: &Stats) -> Result<(), Failure> {
        let findings = Findings {
            prompts: &PROMPTS,
            outcomes: &self.outcomes,
            abort: &self.abort,
            last,
            wall: self.wall,
        };
        say(&findings.table(self.style))?;
        say(&format!(
            "  KV blocks at the end: {} of {} in use, {} kept for prompts that begin alike; {} steps of the engine in all",
            last.kv_blocks_owned, last.kv_blocks_total, last.kv_blocks_cached, last.steps_total
        ))?;
        match findings.problems() {
            problems if problems.is_empty() => Ok(()),
            problems => {
                Err(Failure::runtime(format_args!("the demonstration found: {}", problems.join("; "))))
            }
        }
    }
}
