//! `vllm.grpc.engine.VllmEngine`: what gateways speak that know vLLM. The same engine behind the same door as `tidemill.v1`.

mod loads;
mod tokenizer;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use tidemill_engine::{
    EngineHandle, ErrorCode, KvWatch, LoadError, RequestError,
    ids::RequestId,
    model::files::{CONFIG, ModelFiles},
};
use tidemill_proto::{
    smg::grpc::common,
    vllm::grpc::engine::{self as vllm, vllm_engine_server::VllmEngine},
};
use tokio::sync::OnceCell;
use tonic::{Request, Response, Status};

use super::{
    call::Call,
    door::{Door, Origin, request_id},
    kv_events::KvEvents,
    lifecycle::Phase,
    stream::{Answer, ResponseStream},
};
use crate::{
    clock::since_1970,
    convert::{
        self,
        vllm::{CompletionWriter, ConfigFacts, KvEventWriter, Wanted},
    },
};
use loads::LoadMeter;
use tokenizer::Archive;

/// The engine as a gateway's worker.
#[derive(Debug)]
pub struct VllmService {
    door: Door,
    loads: LoadMeter,
    /// Made when the first gateway asks; the model stays the same.
    config: OnceCell<ConfigFacts>,
    tokenizer: OnceCell<Arc<Archive>>,
    /// Milliseconds since 1970 when the last Generate came; 0 for none.
    last_receive_ms: AtomicU64,
}

impl VllmService {
    /// A service over the server's engine.
    pub fn new(door: Door) -> Self {
        Self {
            door,
            loads: LoadMeter::default(),
            config: OnceCell::new(),
            tokenizer: OnceCell::new(),
            last_receive_ms: AtomicU64::new(0),
        }
    }

    fn health(&self) -> Result<vllm::HealthCheckResponse, Status> {
        self.door.engine()?;
        let lifecycle = self.door.lifecycle();
        let healthy = lifecycle.is_healthy();
        let message = match lifecycle.phase() {
            _ if healthy => "serving",
            Phase::Loading | Phase::Ready => "no step has ended for a long time",
            Phase::Draining | Phase::Stopped => "the server is draining: new requests are refused",
        };
        Ok(vllm::HealthCheckResponse { healthy, message: message.into() })
    }

    async fn abort_requests(&self, ids: Vec<String>) -> Result<vllm::AbortResponse, Status> {
        let engine = self.door.engine()?;
        for id in ids {
            let id = RequestId::new(id);
            let receipt = engine.abort(id.clone()).await.map_err(|error| convert::status(&error, &id))?;
            tracing::debug!(request_id = ?id.as_str(), ?receipt, "abort");
        }
        Ok(vllm::AbortResponse {})
    }

    async fn flush(&self, timeout: f32, id: &RequestId) -> Result<common::FlushCacheResponse, Status> {
        let engine = self.door.engine()?;
        let to_status = |error: RequestError| convert::status(&error, id);
        if !(timeout.is_finite() && timeout >= 0.0) {
            let message = format!("{timeout} is not a time to wait; use 0 or more");
            return Err(to_status(RequestError::invalid("timeout_s", message)));
        }
        let freed = engine.reset_prefix_cache().await.map_err(to_status)?;
        let message = format!("{freed} blocks are free; those that requests use become free when these end");
        Ok(common::FlushCacheResponse { success: true, message })
    }

    /// What a gateway wants of `config.json`, read once.
    async fn config(&self, call: &Call) -> Result<&ConfigFacts, Status> {
        let read = || self.door.with_text(call, |text, _| read_config(text.files()));
        self.config.get_or_try_init(read).await
    }

    async fn model_info(&self, call: &Call) -> Result<vllm::GetModelInfoResponse, Status> {
        let config = self.config(call).await?;
        Ok(convert::vllm::model_info(self.door.engine()?.info(), config))
    }

    fn server_info(&self) -> Result<vllm::GetServerInfoResponse, Status> {
        let engine = self.door.engine()?;
        let last_receive = self.last_receive_ms.load(Relaxed) as f64 / 1e3;
        Ok(convert::vllm::server_info(engine.info(), &engine.stats(), last_receive))
    }

    fn current_loads(&self, rank: Option<i32>, id: &RequestId) -> Result<vllm::GetLoadsResponse, Status> {
        let engine = self.door.engine()?;
        if let Some(rank) = rank.filter(|&rank| rank != 0) {
            let error =
                RequestError::invalid("dp_rank", format!("{rank} is not here: a server is one rank, 0"));
            return Err(convert::status(&error, id));
        }
        let stats = engine.stats();
        let rates = self.loads.rates(Instant::now(), &stats.counters);
        Ok(convert::vllm::loads_response(engine.info(), &stats, rates))
    }

    /// The tokenizer's files, packed once.
    async fn archive(&self, call: &Call) -> Result<Arc<Archive>, Status> {
        let pack = || {
            self.door.with_text(call, |text, _| {
                text.require("the tokenizer's archive")?;
                Archive::of(text.files()).map(Arc::new)
            })
        };
        self.tokenizer.get_or_try_init(pack).await.cloned()
    }

    /// Changes of the prefix cache from what is stored now on.
    async fn watch_kv(&self, start: u64, id: &RequestId) -> Result<(EngineHandle, KvWatch), Status> {
        let engine = self.door.engine()?.clone();
        if start != 0 {
            return Err(Status::out_of_range(
                "no history of changes is kept; subscribe from 0: the stream begins with what is stored then",
            ));
        }
        match engine.watch_kv().await {
            Ok(watch) => Ok((engine, watch)),
            // By this status a gateway knows that it need not try again.
            Err(error) if error.code() == ErrorCode::FailedPrecondition => {
                Err(Status::unimplemented(error.to_string()))
            }
            Err(error) => Err(convert::status(&error, id)),
        }
    }
}

#[tonic::async_trait]
impl VllmEngine for VllmService {
    type GenerateStream = ResponseStream<vllm::GenerateResponse>;

    async fn generate(
        &self,
        request: Request<vllm::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        self.last_receive_ms.store(since_1970().as_millis() as u64, Relaxed);
        let origin = Origin::of(&request);
        let request = request.into_inner();
        let (id, chunks) = (request_id(&request.request_id), request.stream);
        let mut call = Call::start("vllm.Generate", id.clone());
        let named = id.clone();
        let read = move || convert::vllm::generate_request(named, request);
        match self.door.admit(&id, origin, read).await {
            Ok(admitted) => {
                call.prompt_tokens(admitted.prompt_tokens);
                let response = call.respond(());
                let writer = CompletionWriter::new(Wanted {
                    chunks,
                    prompt_tokens: admitted.prompt_tokens,
                    prompt_logprobs_from: admitted.prompt_logprobs.then_some(admitted.first_prompt_token),
                });
                let answer = Answer::new(admitted.generation, writer, call);
                Ok(response.map(|()| answer.into_stream()))
            }
            Err(status) => Err(call.fail(status)),
        }
    }

    async fn embed(
        &self,
        request: Request<vllm::EmbedRequest>,
    ) -> Result<Response<vllm::EmbedResponse>, Status> {
        let origin = Origin::of(&request);
        let request = request.into_inner();
        let id = request_id(&request.request_id);
        let mut call = Call::start("vllm.Embed", id.clone());
        let read = move || convert::vllm::embed_request(id, request);
        let embedding = self.door.embed(&mut call, origin, read).await;
        call.end(embedding.map(convert::vllm::embed_response))
    }

    async fn health_check(
        &self,
        _: Request<vllm::HealthCheckRequest>,
    ) -> Result<Response<vllm::HealthCheckResponse>, Status> {
        Call::start("vllm.HealthCheck", RequestId::random()).end(self.health())
    }

    async fn flush_cache(
        &self,
        request: Request<common::FlushCacheRequest>,
    ) -> Result<Response<common::FlushCacheResponse>, Status> {
        let call = Call::start("vllm.FlushCache", RequestId::random());
        let result = self.flush(request.into_inner().timeout_s, call.id()).await;
        call.end(result)
    }

    async fn start_profile(
        &self,
        _: Request<common::StartProfileRequest>,
    ) -> Result<Response<common::ProfileResponse>, Status> {
        Call::start("vllm.StartProfile", RequestId::random()).end(Err(no_profiler()))
    }

    async fn stop_profile(
        &self,
        _: Request<common::StopProfileRequest>,
    ) -> Result<Response<common::ProfileResponse>, Status> {
        Call::start("vllm.StopProfile", RequestId::random()).end(Err(no_profiler()))
    }

    async fn abort(
        &self,
        request: Request<vllm::AbortRequest>,
    ) -> Result<Response<vllm::AbortResponse>, Status> {
        let call = Call::start("vllm.Abort", RequestId::random());
        let result = self.abort_requests(request.into_inner().request_ids).await;
        call.end(result)
    }

    async fn get_model_info(
        &self,
        _: Request<vllm::GetModelInfoRequest>,
    ) -> Result<Response<vllm::GetModelInfoResponse>, Status> {
        let call = Call::start("vllm.GetModelInfo", RequestId::random());
        let result = self.model_info(&call).await;
        call.end(result)
    }

    async fn get_server_info(
        &self,
        _: Request<vllm::GetServerInfoRequest>,
    ) -> Result<Response<vllm::GetServerInfoResponse>, Status> {
        Call::start("vllm.GetServerInfo", RequestId::random()).end(self.server_info())
    }

    async fn get_loads(
        &self,
        request: Request<vllm::GetLoadsRequest>,
    ) -> Result<Response<vllm::GetLoadsResponse>, Status> {
        let call = Call::start("vllm.GetLoads", RequestId::random());
        let result = self.current_loads(request.into_inner().dp_rank, call.id());
        call.end(result)
    }

    type GetTokenizerStream = ResponseStream<common::GetTokenizerChunk>;

    async fn get_tokenizer(
        &self,
        _: Request<common::GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        let mut call = Call::start("vllm.GetTokenizer", RequestId::random());
        match self.archive(&call).await {
            Ok(archive) => Ok(call.respond(()).map(|()| tokenizer::stream(archive, call))),
            Err(status) => Err(call.fail(status)),
        }
    }

    type SubscribeKvEventsStream = ResponseStream<common::KvEventBatch>;

    async fn subscribe_kv_events(
        &self,
        request: Request<common::SubscribeKvEventsRequest>,
    ) -> Result<Response<Self::SubscribeKvEventsStream>, Status> {
        let mut call = Call::start("vllm.SubscribeKvEvents", RequestId::random());
        let start = request.into_inner().start_sequence_number;
        let (engine, watch) = match self.watch_kv(start, call.id()).await {
            Ok(watch) => watch,
            Err(status) => return Err(call.fail(status)),
        };
        let response = call.respond(());
        let mut writer = KvEventWriter::new(engine.info().block_size);
        let to_messages = move |batch| writer.messages(batch);
        let lifecycle = self.door.lifecycle().clone();
        let events = KvEvents { engine, watch, to_messages, lifecycle, call };
        Ok(response.map(|()| events.into_stream()))
    }
}

fn no_profiler() -> Status {
    Status::unimplemented(
        "there is no profiler to start; --otlp-endpoint sends traces, and tidemill.v1.Control/GetStats has the times of steps",
    )
}

fn read_config(files: &ModelFiles) -> Result<ConfigFacts, RequestError> {
    let bytes = files.require(CONFIG).map_err(|error| unreadable(&error))?;
    serde_json::from_slice(&bytes).map_err(|error| RequestError::Internal(format!("{CONFIG}: {error}")))
}

/// The model was loaded, but its folder has changed since.
fn unreadable(error: &LoadError) -> RequestError {
    RequestError::Internal(format!("the model folder cannot be read any more: {error}"))
}
