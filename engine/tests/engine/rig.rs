//! An engine whose device finishes a step only when the test lets it.

use std::{
    collections::VecDeque,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, unbounded};
use tidemill_engine::{
    EmbeddingInfo, Engine, EngineHandle, EngineOptions, Generation, LoadError, ModelInfo, Pooling,
    RequestError, SchedulingConfig,
    ids::{RequestId, TokenId},
    model::{
        files::{ModelFiles, ModelSource},
        generation_config::GenerationDefaults,
        spec::ModelSpec,
    },
    output::Output,
    request::{GenerateRequest, Prompt},
    runner::{DeviceLost, Runner, RunnerError, RunnerThread},
    sampling::SamplingParams,
    scheduler::{PlanRow, RowOutput, RowResult, StepOutput, StepPlan},
    text::TextModel,
};

pub const BLOCKS: usize = 16;
pub const BLOCK_SIZE: usize = 4;
/// A prompt with this token makes the runner panic.
pub const POISON: TokenId = TokenId(66);
/// A prompt with this token has no finite logits.
pub const NAN: TokenId = TokenId(67);

/// A prompt with this token takes the device down.
pub const LOSS: TokenId = TokenId(68);

/// H.
pub const WIDTH: usize = 3;

/// The hidden state at a position.
pub fn state(position: usize) -> [f32; WIDTH] {
    [1.0, position as f32, 0.25 * (position * position) as f32]
}

/// A device that finishes a step only when the test lets it; the next token is the position, plus 300.
struct GatedRunner {
    gate: Receiver<()>,
    started: Sender<StepPlan>,
    steps: VecDeque<StepPlan>,
}

impl Runner for GatedRunner {
    fn launch(&mut self, plan: &StepPlan) -> Result<(), RunnerError> {
        // Fails only at the end of a test.
        drop(self.started.send(plan.clone()));
        self.steps.push_back(plan.clone());
        Ok(())
    }

    fn wait(&mut self) -> Result<StepOutput, RunnerError> {
        let plan = self.steps.pop_front().expect("something was launched");
        // Fails only at the end of a test.
        let _ = self.gate.recv();
        let any = |token| plan.rows.iter().any(|row| row.input.known().contains(&token));
        assert!(!any(POISON), "poisoned");
        if any(LOSS) {
            return Err(DeviceLost("fell off the bus".into()).into());
        }
        let result = |row: &PlanRow| {
            if row.input.known().contains(&NAN) {
                return RowResult::NotFinite;
            }
            let sampled = row.sample.as_ref().map(|sample| TokenId(300 + sample.position as u32));
            let states = row.pool_at.clone().flat_map(state).collect();
            RowResult::Done(RowOutput { sampled, logprobs: None, prompt_logprobs: Vec::new(), states })
        };
        Ok(StepOutput { rows: plan.rows.iter().map(result).collect() })
    }

    fn is_done(&mut self) -> bool {
        false
    }
}

pub struct Bench {
    pub gate: Sender<()>,
    pub started: Receiver<StepPlan>,
    // Dropped last: the gate must be open when the engine waits for its runner.
    pub engine: Option<Engine>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        (0..1000).for_each(|_| self.gate.send(()).unwrap_or(()));
        self.engine = None;
    }
}

/// What differs from test to test.
pub struct Options {
    pub engine: EngineOptions,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub pooling: Pooling,
}

impl Bench {
    /// Two rows, chunks of 8 tokens, three places in the queue.
    pub fn new() -> Self {
        Self::with(|_| ())
    }

    pub fn looking_ahead(look_ahead: bool) -> Self {
        Self::with(|options| options.engine.look_ahead = look_ahead)
    }

    pub fn with(change: impl FnOnce(&mut Options)) -> Self {
        Self::try_with(change).unwrap()
    }

    pub fn try_with(change: impl FnOnce(&mut Options)) -> Result<Self, LoadError> {
        let mut options = Options {
            engine: EngineOptions {
                scheduling: SchedulingConfig { max_num_queued_reqs: 3, ..SchedulingConfig::default() },
                look_ahead: true,
                ..EngineOptions::default()
            },
            max_num_seqs: 2,
            max_num_batched_tokens: 8,
            pooling: Pooling::Mean,
        };
        change(&mut options);
        let (gate, gate_rx) = unbounded();
        let (started_tx, started) = unbounded();
        let (runner, ()) = RunnerThread::start(move || {
            Ok((GatedRunner { gate: gate_rx, started: started_tx, steps: VecDeque::new() }, ()))
        })?;
        let files = ModelFiles::open(&ModelSource::Builtin)?;
        let spec = ModelSpec::load(&files)?;
        let text = Arc::new(TextModel::load(&files, &spec)?);
        let info = ModelInfo {
            served_model_name: "sim".into(),
            architecture: "none".into(),
            num_parameters: 0,
            weight_bytes_per_step: 0,
            vocab_size: spec.vocab_size,
            max_model_len: BLOCKS * BLOCK_SIZE,
            device: "simulated".into(),
            dtype: "float32",
            kv_cache_dtype: "float32",
            block_size: BLOCK_SIZE,
            num_kv_blocks: BLOCKS,
            max_num_seqs: options.max_num_seqs,
            max_num_batched_tokens: options.max_num_batched_tokens,
            eos_token_ids: Vec::new(),
            has_chat_template: true,
            defaults: GenerationDefaults::default(),
            is_bidirectional: false,
            embedding: EmbeddingInfo {
                dimensions: WIDTH,
                pooling: options.pooling,
                normalize: false,
                is_only_output: false,
            },
            scoring: None,
        };
        Ok(Self { gate, started, engine: Some(Engine::with_runner(runner, info, text, options.engine)?) })
    }

    pub fn handle(&self) -> EngineHandle {
        self.engine.as_ref().unwrap().handle()
    }

    /// Waits until another step is in flight.
    pub fn step_started(&self) -> StepPlan {
        self.started.recv_timeout(Duration::from_secs(10)).expect("a step should have started")
    }

    pub fn finish_step(&self) {
        self.gate.send(()).unwrap();
    }

    pub fn finish_steps(&self, steps: usize) {
        (0..steps).for_each(|_| self.finish_step());
    }

    /// Nobody holds a block; some may be kept for those who come with the same beginning.
    pub fn all_free(&self) -> bool {
        self.handle().stats().kv_blocks.owned == 0
    }
}

pub fn request(id: &str, prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    let prompt = Prompt::TokenIds(prompt.iter().copied().map(TokenId).collect());
    GenerateRequest {
        id: Some(RequestId::new(id)),
        sampling: SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() },
        ..GenerateRequest::new(prompt)
    }
}

pub fn submit(handle: &EngineHandle, request: GenerateRequest) -> Generation {
    handle.submit(handle.validate(request).unwrap()).unwrap()
}

pub fn collect(mut generation: Generation) -> Result<(Vec<u32>, Output), RequestError> {
    let mut tokens = Vec::new();
    loop {
        let output = generation.next_blocking().expect("a stream ends with a finish or an error")?;
        tokens.extend(output.token_ids.iter().map(|token| token.0));
        if output.finish.is_some() {
            assert!(generation.next_blocking().is_none(), "nothing comes after the end");
            return Ok((tokens, output));
        }
    }
}

pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Drives a future that needs no runtime.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
            std::task::Poll::Ready(output) => return output,
            std::task::Poll::Pending => thread::park(),
        }
    }
}
