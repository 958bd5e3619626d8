//! What the scheduler does for those who are served: each part starts servers of its own, which differ in the option that it is about, and
//! lets them take turns, so that a noisy machine disturbs all of them alike.

mod client;
mod crowd;
mod long_prompt;
mod overload;
mod short_prompts;
mod tenants;
mod urgent;
mod warm_prefix;

use std::{
    cell::Cell,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use client::Ask;
use serde_json::Value;
use tidemill_proto::v1::{GetModelRequest, GetModelResponse, inference_client::InferenceClient};
use tonic::transport::Channel;

use crate::{load, server::ServerProcess};

/// Whatever went wrong.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// One question to the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// TTFT of a prompt that is in the prefix cache against one that is not, by length.
    WarmPrefix,
    /// ITL of streams while long prompts arrive: read at once, in chunks, and with a target.
    LongPrompt,
    /// TTFT of short prompts that arrive just behind a long one.
    ShortPrompts,
    /// Shares of two tenants, one of which floods.
    Tenants,
    /// Goodput against offered load, with and without limits on the queue.
    Overload,
    /// TTFT of an urgent request on a full server.
    Urgent,
}

impl Part {
    /// Runs it, prints its table and returns its figures.
    ///
    /// # Errors
    /// When a server does not start, a request fails that should not, or a server does not do what the part is about.
    pub async fn run(self, bench: &Bench) -> Result<Value, Error> {
        match self {
            Self::WarmPrefix => warm_prefix::run(bench).await,
            Self::LongPrompt => long_prompt::run(bench).await,
            Self::ShortPrompts => short_prompts::run(bench).await,
            Self::Tenants => tenants::run(bench).await,
            Self::Overload => overload::run(bench).await,
            Self::Urgent => urgent::run(bench).await,
        }
    }
}

/// How much is measured.
#[derive(Debug, Clone)]
pub struct Size {
    /// Rounds in which the servers take turns.
    pub rounds: usize,
    /// How long a server is loaded in one round.
    pub window: Duration,
    /// Tokens of the longest prompt, at most.
    pub longest_prompt: usize,
    /// Offered loads, as multiples of the measured capacity.
    pub loads: Vec<f64>,
}

impl Size {
    /// The least that passes through everything once.
    pub fn smallest() -> Self {
        Self { rounds: 1, window: Duration::from_millis(400), longest_prompt: 256, loads: vec![0.5, 3.0] }
    }
}

/// Where and how much to measure.
#[derive(Debug)]
pub struct Bench {
    /// The `tidemill` binary.
    pub binary: PathBuf,
    /// Model folder, or `builtin`.
    pub model: String,
    /// As `--device` takes it.
    pub device: String,
    /// How much.
    pub size: Size,
    num_prompts: Cell<u64>,
}

impl Bench {
    /// A bench of the server in `binary`.
    pub fn new(binary: PathBuf, model: String, device: String, size: Size) -> Self {
        Self { binary, model, device, size, num_prompts: Cell::new(0) }
    }

    /// Starts a server with these options, and warms it with one request.
    ///
    /// # Errors
    /// When it does not start or does not answer.
    pub async fn serve(&self, options: &[&str]) -> Result<Served, Error> {
        let common = ["--model", &self.model, "--device", &self.device, "--log-level", "warn"];
        let process = ServerProcess::start_binary(&self.binary, &[&common, options].concat())?;
        let mut client = InferenceClient::connect(process.address.clone()).await?;
        let model = client.get_model(GetModelRequest {}).await?.into_inner();
        let served = Served { _process: process, client, model };
        client::answer(&served.client, self.fresh(&served, 64, 16)).await?;
        Ok(served)
    }

    /// A number that no prompt was made of.
    fn next_number(&self) -> u64 {
        // Far apart: a crowd counts on from its number.
        self.num_prompts.replace(self.num_prompts.get() + (1 << 32))
    }

    /// A request whose prompt no server has seen.
    fn fresh(&self, served: &Served, prompt_tokens: usize, max_tokens: u32) -> Ask {
        let prompt = load::prompt(self.next_number(), prompt_tokens, served.model.vocab_size);
        Ask { prompt, max_tokens, priority: 0, tenant: String::new() }
    }

    /// Tokens of the longest prompt that the server and the bench take, with room for 64 more.
    fn longest_prompt(&self, served: &Served) -> usize {
        (served.model.max_model_len as usize - 64).min(self.size.longest_prompt)
    }

    /// When a window that begins now is over.
    fn window_end(&self) -> Instant {
        Instant::now() + self.size.window
    }
}

/// A server, and a connection to it.
#[derive(Debug)]
pub struct Served {
    _process: ServerProcess,
    /// A connection to it.
    pub client: InferenceClient<Channel>,
    /// What it serves.
    pub model: GetModelResponse,
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
