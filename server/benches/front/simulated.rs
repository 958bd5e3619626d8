//! The process that is measured: the real servers over an engine that computes nothing.

use std::{
    collections::VecDeque,
    io::{BufRead, Write},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tidemill::{
    client::LocalEngine,
    config::{GrpcConfig, HttpConfig},
    exit::Failure,
    grpc::Server,
    http::{HttpServer, answer::Parsers},
};
use tidemill_engine::{
    Engine, EngineConfig, EngineHandle, EngineOptions,
    ids::TokenId,
    model::files::ModelSource,
    request::{GenerateRequest, Prompt},
    runner::{Runner, RunnerError, RunnerThread},
    sampling::SamplingParams,
    scheduler::{PlanRow, RowOutput, RowResult, StepOutput, StepPlan},
};
use tokio::runtime::{Builder, Runtime};

use crate::{Result, STREAMS, TOKENS};

/// Different tokens that are given.
const VOCABULARY: usize = 64;

/// A device that takes no time but what the rate demands.
struct Simulated {
    words: Vec<TokenId>,
    /// Between two tokens of a row, or zero.
    pause: Duration,
    due: Instant,
    steps: VecDeque<StepPlan>,
}

impl Runner for Simulated {
    fn launch(&mut self, plan: &StepPlan) -> std::result::Result<(), RunnerError> {
        self.steps.push_back(plan.clone());
        Ok(())
    }

    fn wait(&mut self) -> std::result::Result<StepOutput, RunnerError> {
        if !self.pause.is_zero() {
            // What was missed is not made up for all at once.
            self.due = (self.due + self.pause).max(Instant::now() - 4 * self.pause);
            thread::sleep(self.due.saturating_duration_since(Instant::now()));
        }
        let step = self.steps.pop_front().ok_or_else(|| RunnerError::Step("nothing is in flight".into()))?;
        let row = |row: &PlanRow| {
            let word = || self.words[(row.seq.0 as usize * 7 + row.end()) % self.words.len()];
            let sampled = row.sample.as_ref().map(|_| word());
            RowResult::Done(RowOutput {
                sampled,
                logprobs: None,
                prompt_logprobs: Vec::new(),
                states: Vec::new(),
            })
        };
        Ok(StepOutput { rows: step.rows.iter().map(row).collect() })
    }

    fn is_done(&mut self) -> bool {
        false
    }
}

/// An engine that gives `rate` tokens a second to a full batch, or as many as it can. Every token is a word with one space before it.
fn engine(rate: u64) -> Result<Engine> {
    let mut config = EngineConfig::new(ModelSource::Builtin);
    config.threads = Some(1);
    let like = Engine::start(config, |_| ())?.handle();
    let (mut info, text) = (like.info().clone(), like.text().clone());
    let is_word = |id: &TokenId| {
        let bytes = text.token_bytes(*id);
        matches!(bytes, [b' ', word @ ..] if (3..6).contains(&word.len()) && word.iter().all(u8::is_ascii_lowercase))
    };
    let words: Vec<TokenId> =
        (0..info.vocab_size as u32).map(TokenId).filter(is_word).take(VOCABULARY).collect();
    assert_eq!(words.len(), VOCABULARY, "the built-in vocabulary has words");
    info.max_num_seqs = STREAMS;
    info.max_num_batched_tokens = 4096;
    info.num_kv_blocks = 2 * STREAMS * info.max_model_len.div_ceil(info.block_size);
    let pause = match rate {
        0 => Duration::ZERO,
        rate => Duration::from_secs_f64(STREAMS as f64 / rate as f64),
    };
    let start = move || Ok((Simulated { words, pause, due: Instant::now(), steps: VecDeque::new() }, ()));
    let (runner, ()) = RunnerThread::start(start)?;
    let options = EngineOptions { look_ahead: true, ..EngineOptions::default() };
    Ok(Engine::with_runner(runner, info, text, options)?)
}

/// As the program has it.
fn runtime() -> Result<Runtime> {
    let cores = thread::available_parallelism().map_or(1, Into::into);
    Ok(Builder::new_multi_thread().worker_threads(cores.clamp(2, 4)).enable_all().build()?)
}

/// Serves until the parent goes away.
pub fn serve(rate: u64) -> Result<()> {
    let engine = engine(rate)?;
    let handle = engine.handle();
    let runtime = runtime()?;
    let (grpc, http) = runtime.block_on(async {
        let grpc = Server::bind(&GrpcConfig::loopback()).await?;
        let client = LocalEngine::new(grpc.lifecycle(), Parsers::default());
        let http = HttpServer::bind(&HttpConfig::loopback(), Arc::new(client)).await?;
        grpc.ready(engine.handle()).await;
        Ok::<_, Failure>((grpc, http))
    })?;
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{} {}", grpc.address(), http.address())?;
    for question in std::io::stdin().lock().lines() {
        match question?.as_str() {
            "alone" => {
                for _ in 0..STREAMS {
                    runtime.spawn(read(handle.clone()));
                }
                writeln!(stdout)?;
            }
            _ => writeln!(stdout, "{}", handle.stats().counters.generation_tokens)?,
        }
    }
    Ok(())
}

/// One answer after the other, read and sent nowhere.
async fn read(engine: EngineHandle) {
    loop {
        let mut request = GenerateRequest::new(Prompt::Text("Once upon a time".into()));
        request.sampling =
            SamplingParams { max_tokens: Some(TOKENS), ignore_eos: true, ..SamplingParams::default() };
        let valid = engine.validate(request).unwrap_or_else(|error| panic!("{error}"));
        let mut generation = engine.submit(valid).unwrap_or_else(|error| panic!("{error}"));
        while let Some(output) = generation.next().await {
            let output = output.unwrap_or_else(|error| panic!("{error}"));
            std::hint::black_box(output);
        }
    }
}
