//! A server of its own for each test: the built-in model behind a free port, and a client that reaches it over TCP.

#![allow(clippy::unwrap_used)]
#![allow(dead_code, missing_docs)]

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tidemill::{config::GrpcConfig, grpc::Server};
use tidemill_engine::{
    Engine, EngineConfig, EngineOptions,
    ids::TokenId,
    model::files::ModelSource,
    runner::{DeviceLost, Runner, RunnerError, RunnerThread},
    scheduler::{PlanRow, RowOutput, RowResult, StepOutput, StepPlan},
};
use tidemill_proto::v1::{
    AbortRequest, AbortResponse, FinishReason, GenerateRequest, GenerateResponse, GetStatsRequest,
    SamplingParams, Stats, control_client::ControlClient, generate_request::Prompt,
    inference_client::InferenceClient,
};
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

pub struct Harness {
    pub server: Option<Server>,
    pub engine: Option<Engine>,
    pub channel: Channel,
    pub inference: InferenceClient<Channel>,
    pub control: ControlClient<Channel>,
}

pub fn engine_config() -> EngineConfig {
    let mut config = EngineConfig::new(ModelSource::Builtin);
    config.max_num_seqs = Some(8);
    config.threads = Some(1);
    config
}

/// One row, and one place in the queue.
pub fn narrow(config: &mut EngineConfig) {
    config.max_num_seqs = Some(1);
    config.scheduling.max_num_queued_reqs = 1;
}

/// A device that gives the same token again and again, until it is pulled out.
struct Frail {
    lost: Arc<AtomicBool>,
    steps: VecDeque<StepPlan>,
}

impl Runner for Frail {
    fn launch(&mut self, plan: &StepPlan) -> Result<(), RunnerError> {
        self.steps.push_back(plan.clone());
        Ok(())
    }

    fn wait(&mut self) -> Result<StepOutput, RunnerError> {
        std::thread::sleep(Duration::from_millis(2));
        if self.lost.load(Relaxed) {
            return Err(DeviceLost("secret: it fell off the bus".into()).into());
        }
        let row = |row: &PlanRow| {
            let sampled = row.sample.as_ref().map(|_| TokenId(300));
            RowResult::Done(RowOutput {
                sampled,
                logprobs: None,
                prompt_logprobs: Vec::new(),
                states: Vec::new(),
            })
        };
        Ok(StepOutput { rows: self.steps.pop_front().unwrap().rows.iter().map(row).collect() })
    }

    fn is_done(&mut self) -> bool {
        false
    }
}

/// An engine whose device is lost when the flag is set.
pub fn frail_engine(lost: Arc<AtomicBool>, config: EngineConfig) -> Engine {
    let options =
        EngineOptions { scheduling: config.scheduling.clone(), look_ahead: true, ..EngineOptions::default() };
    let like = Engine::start(config, |_| ()).unwrap().handle();
    let (runner, ()) = RunnerThread::start(move || Ok((Frail { lost, steps: VecDeque::new() }, ()))).unwrap();
    Engine::with_runner(runner, like.info().clone(), like.text().clone(), options).unwrap()
}

impl Harness {
    pub async fn start() -> Self {
        Self::with(|_| (), GrpcConfig::loopback()).await
    }

    pub async fn tuned(tune: impl FnOnce(&mut EngineConfig)) -> Self {
        Self::with(tune, GrpcConfig::loopback()).await
    }

    pub async fn with(tune: impl FnOnce(&mut EngineConfig), grpc: GrpcConfig) -> Self {
        let mut harness = Self::loading(grpc).await;
        let mut config = engine_config();
        tune(&mut config);
        let engine = tokio::task::spawn_blocking(|| Engine::start(config, |_| ())).await.unwrap().unwrap();
        harness.server().ready(engine.handle()).await;
        harness.engine = Some(engine);
        harness
    }

    /// A server that has no engine yet.
    pub async fn loading(grpc: GrpcConfig) -> Self {
        let server = Server::bind(&grpc).await.unwrap();
        let channel =
            Endpoint::from_shared(format!("http://{}", server.address())).unwrap().connect().await.unwrap();
        Self {
            inference: InferenceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            control: ControlClient::new(channel.clone()),
            channel,
            server: Some(server),
            engine: None,
        }
    }

    pub fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    pub async fn stats(&mut self) -> Stats {
        self.control.get_stats(GetStatsRequest {}).await.unwrap().into_inner().stats.unwrap()
    }

    pub async fn abort(&mut self, id: &str) -> AbortResponse {
        self.control.abort(AbortRequest { request_id: id.into() }).await.unwrap().into_inner()
    }

    /// Starts a stream and waits until it gave its first message.
    pub async fn started(&mut self, request: GenerateRequest) -> Streaming<GenerateResponse> {
        let mut stream = self.inference.generate(request).await.unwrap().into_inner();
        stream.message().await.unwrap().expect("has a first message");
        stream
    }

    pub async fn generate(&mut self, request: GenerateRequest) -> Result<Vec<Completion>, Status> {
        collect(self.inference.generate(request).await?.into_inner()).await
    }

    /// One completion.
    pub async fn complete(&mut self, request: GenerateRequest) -> Completion {
        let mut all = self.generate(request).await.unwrap();
        assert_eq!(all.len(), 1);
        all.remove(0)
    }

    /// Waits until nothing is running and all blocks are free; fails when that does not come soon.
    pub async fn at_rest(&mut self) -> Stats {
        self.until("at rest", |stats| {
            stats.num_requests_running + stats.num_requests_waiting == 0
                && stats.kv_blocks_owned == 0
                && stats.kv_blocks_free + stats.kv_blocks_cached == stats.kv_blocks_total
        })
        .await
    }

    pub async fn until(&mut self, what: &str, done: impl Fn(&Stats) -> bool) -> Stats {
        let started = Instant::now();
        loop {
            let stats = self.stats().await;
            if done(&stats) {
                return stats;
            }
            assert!(started.elapsed() < Duration::from_secs(5), "not {what}: {stats:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// What the messages of one completion say together.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Completion {
    pub text: String,
    pub ids: Vec<u32>,
    pub finish: FinishReason,
    pub last: GenerateResponse,
    pub messages: Vec<GenerateResponse>,
}

/// Reads a stream to its end; checks what holds for every stream.
pub async fn collect(mut stream: Streaming<GenerateResponse>) -> Result<Vec<Completion>, Status> {
    let mut all: Vec<Completion> = Vec::new();
    while let Some(message) = stream.message().await? {
        let index = message.index as usize;
        if all.len() <= index {
            all.resize_with(index + 1, Completion::default);
        }
        let completion = &mut all[index];
        assert_eq!(completion.finish, FinishReason::Unspecified, "a message after the last: {message:?}");
        completion.text.push_str(&message.text);
        completion.ids.extend(&message.token_ids);
        completion.finish = message.finish_reason();
        assert_eq!(
            message.usage.is_some(),
            completion.finish != FinishReason::Unspecified,
            "usage comes last, once"
        );
        completion.last = message.clone();
        completion.messages.push(message);
    }
    for completion in &all {
        assert_ne!(completion.finish, FinishReason::Unspecified, "no last message");
        let usage = completion.last.usage.as_ref().unwrap();
        assert_eq!(usage.completion_tokens as usize, completion.ids.len());
    }
    Ok(all)
}

pub fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: Some(0.0), max_tokens: Some(max_tokens), ..SamplingParams::default() }
}

pub fn text(prompt: &str, sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Text(prompt.into())),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    }
}

/// A request that keeps the engine busy for as long as a test lasts.
pub fn endless(id: &str) -> GenerateRequest {
    let sampling = SamplingParams { ignore_eos: true, n: Some(8), ..greedy(1000) };
    GenerateRequest { request_id: id.into(), ..text("Once upon a time", sampling) }
}

/// One completion, as long as the context.
pub fn alone(id: &str) -> GenerateRequest {
    let mut request = endless(id);
    request.sampling.as_mut().unwrap().n = None;
    request
}
