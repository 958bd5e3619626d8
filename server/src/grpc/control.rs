//! `tidemill.v1.Control`.

use std::{sync::Arc, time::Duration};

use tidemill_engine::{EngineHandle, KvWatch, RequestError, ids::RequestId};
use tidemill_proto::v1::{self, control_server::Control};
use tonic::{Request, Response, Status};

use super::{
    call::Call,
    kv_events::KvEvents,
    lifecycle::{Lifecycle, Phase},
    readings::{self, Readings},
    stream::ResponseStream,
    texts::TextWorkers,
};
use crate::convert;

/// Operates the engine.
#[derive(Debug)]
pub struct ControlService {
    lifecycle: Arc<Lifecycle>,
    grace: Duration,
    texts: TextWorkers,
}

impl ControlService {
    /// A service over the server's engine; `grace` is what `Drain` waits when its caller does not say.
    pub fn new(lifecycle: Arc<Lifecycle>, grace: Duration) -> Self {
        Self { lifecycle, grace, texts: TextWorkers::default() }
    }

    /// The id of a request that is to be looked up.
    fn known_form(id: &RequestId) -> Result<(), Status> {
        if (1..=RequestId::MAX_BYTES).contains(&id.as_str().len()) {
            return Ok(());
        }
        let message = format!("must have 1 to {} bytes", RequestId::MAX_BYTES);
        Err(convert::status(&RequestError::invalid("request_id", message), id))
    }

    async fn abort_request(&self, id: RequestId) -> Result<v1::AbortResponse, Status> {
        let to_status = |error: RequestError| convert::status(&error, &id);
        let engine = self.lifecycle.engine()?;
        Self::known_form(&id)?;
        let receipt = engine.abort(id.clone()).await.map_err(to_status)?;
        tracing::debug!(request_id = ?id.as_str(), ?receipt, "abort");
        Ok(convert::abort_response(&receipt))
    }

    async fn abort_everything(&self, id: &RequestId) -> Result<v1::AbortAllResponse, Status> {
        let receipts =
            self.lifecycle.engine()?.abort_all().await.map_err(|error| convert::status(&error, id))?;
        tracing::info!(requests = receipts.len(), "all requests are aborted");
        Ok(convert::abort_all_response(&receipts))
    }

    async fn explain_request(&self, id: RequestId) -> Result<v1::ExplainResponse, Status> {
        let engine = self.lifecycle.engine()?;
        Self::known_form(&id)?;
        match engine.explain(id.clone()).await {
            Ok(Some(explanation)) => Ok(convert::explain_response(&explanation)),
            Ok(None) => Err(Status::not_found(
                "no request of this id is live, and none that ended lately is remembered by it",
            )),
            Err(error) => Err(convert::status(&error, &id)),
        }
    }

    async fn reset_cache(&self, id: &RequestId) -> Result<v1::ResetPrefixCacheResponse, Status> {
        let freed = self.lifecycle.engine()?.reset_prefix_cache().await;
        let freed = freed.map_err(|error| convert::status(&error, id))?;
        Ok(v1::ResetPrefixCacheResponse { blocks_freed: freed as u32 })
    }

    /// Loads an adapter off the network's threads: reading its files takes time.
    async fn load(&self, request: v1::LoadAdapterRequest, id: &RequestId) -> Result<(), Status> {
        let adapters = self.lifecycle.engine()?.adapters().clone();
        let v1::LoadAdapterRequest { lora_name, lora_path } = request;
        let loaded = self.texts.run(move || adapters.load(&lora_name, &lora_path)).await;
        loaded.map_err(|error| convert::status(&error, id))
    }

    fn unload(&self, name: &str, id: &RequestId) -> Result<(), Status> {
        let unloaded = self.lifecycle.engine()?.adapters().unload(name);
        unloaded.map_err(|error| convert::status(&error, id))
    }

    /// Changes of the prefix cache, with what is needed to stream them.
    async fn watch_kv(&self, id: &RequestId) -> Result<(EngineHandle, KvWatch), Status> {
        let engine = self.lifecycle.engine()?.clone();
        let watch = engine.watch_kv().await.map_err(|error| convert::status(&error, id))?;
        Ok((engine, watch))
    }

    /// What is needed to stream readings.
    fn read_every(
        &self,
        every: Result<Duration, RequestError>,
        mut call: Call,
    ) -> Result<Response<Readings>, Status> {
        let every = every.map_err(|error| convert::status(&error, call.id()));
        match every.and_then(|every| Ok((every, self.lifecycle.engine()?.clone()))) {
            Ok((every, engine)) => {
                let response = call.respond(());
                Ok(response.map(|()| Readings { engine, every, lifecycle: self.lifecycle.clone(), call }))
            }
            Err(status) => Err(call.fail(status)),
        }
    }

    async fn drain_for(
        &self,
        grace: Result<Duration, RequestError>,
        id: &RequestId,
    ) -> Result<v1::DrainResponse, Status> {
        let to_status = |error: RequestError| convert::status(&error, id);
        let (engine, grace) = (self.lifecycle.engine()?, grace.map_err(to_status)?);
        // The engine drains even if the caller does not wait for it.
        self.lifecycle.enter(Phase::Draining).await;
        engine.drain(grace).await.map(convert::drain_response).map_err(to_status)
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn abort(&self, request: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        let id = RequestId::new(request.into_inner().request_id);
        let call = Call::start("Abort", id.clone());
        let result = self.abort_request(id).await;
        call.end(result)
    }

    async fn get_stats(
        &self,
        _: Request<v1::GetStatsRequest>,
    ) -> Result<Response<v1::GetStatsResponse>, Status> {
        let call = Call::start("GetStats", RequestId::random());
        let stats =
            |engine: &EngineHandle| v1::GetStatsResponse { stats: Some(convert::stats(&engine.stats())) };
        call.end(self.lifecycle.engine().map(stats))
    }

    type WatchStatsStream = ResponseStream<v1::WatchStatsResponse>;

    async fn watch_stats(
        &self,
        request: Request<v1::WatchStatsRequest>,
    ) -> Result<Response<Self::WatchStatsStream>, Status> {
        let call = Call::start("WatchStats", RequestId::random());
        let every = readings::interval_of(request.into_inner().interval_ms, 1000, 10);
        Ok(self.read_every(every, call)?.map(Readings::stats))
    }

    type WatchActivityStream = ResponseStream<v1::WatchActivityResponse>;

    async fn watch_activity(
        &self,
        request: Request<v1::WatchActivityRequest>,
    ) -> Result<Response<Self::WatchActivityStream>, Status> {
        let call = Call::start("WatchActivity", RequestId::random());
        let every = readings::interval_of(request.into_inner().interval_ms, 500, 50);
        Ok(self.read_every(every, call)?.map(Readings::activity))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let call = Call::start("Drain", RequestId::random());
        let grace = match request.into_inner().timeout_seconds {
            None => Ok(self.grace),
            Some(seconds) => Duration::try_from_secs_f64(seconds).map_err(|_| {
                RequestError::invalid(
                    "timeout_seconds",
                    format!("{seconds} is not a time to wait; use 0 or more"),
                )
            }),
        };
        let result = self.drain_for(grace, call.id()).await;
        call.end(result)
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        let id = RequestId::new(request.into_inner().request_id);
        let call = Call::start("Explain", id.clone());
        let result = self.explain_request(id).await;
        call.end(result)
    }

    type WatchKvEventsStream = ResponseStream<v1::WatchKvEventsResponse>;

    async fn watch_kv_events(
        &self,
        request: Request<v1::WatchKvEventsRequest>,
    ) -> Result<Response<Self::WatchKvEventsStream>, Status> {
        let mut call = Call::start("WatchKvEvents", RequestId::random());
        let include_token_ids = request.into_inner().include_token_ids;
        let (engine, watch) = match self.watch_kv(call.id()).await {
            Ok(watch) => watch,
            Err(status) => return Err(call.fail(status)),
        };
        let response = call.respond(());
        let to_messages = move |batch| convert::kv_event_messages(batch, include_token_ids);
        let events = KvEvents { engine, watch, to_messages, lifecycle: self.lifecycle.clone(), call };
        Ok(response.map(|()| events.into_stream()))
    }

    async fn reset_prefix_cache(
        &self,
        _: Request<v1::ResetPrefixCacheRequest>,
    ) -> Result<Response<v1::ResetPrefixCacheResponse>, Status> {
        let call = Call::start("ResetPrefixCache", RequestId::random());
        let result = self.reset_cache(call.id()).await;
        call.end(result)
    }

    async fn abort_all(
        &self,
        _: Request<v1::AbortAllRequest>,
    ) -> Result<Response<v1::AbortAllResponse>, Status> {
        let call = Call::start("AbortAll", RequestId::random());
        let result = self.abort_everything(call.id()).await;
        call.end(result)
    }

    async fn load_adapter(
        &self,
        request: Request<v1::LoadAdapterRequest>,
    ) -> Result<Response<v1::LoadAdapterResponse>, Status> {
        let call = Call::start("LoadAdapter", RequestId::random());
        let result = self.load(request.into_inner(), call.id()).await;
        call.end(result.map(|()| v1::LoadAdapterResponse {}))
    }

    async fn unload_adapter(
        &self,
        request: Request<v1::UnloadAdapterRequest>,
    ) -> Result<Response<v1::UnloadAdapterResponse>, Status> {
        let call = Call::start("UnloadAdapter", RequestId::random());
        let result = self.unload(&request.into_inner().lora_name, call.id());
        call.end(result.map(|()| v1::UnloadAdapterResponse {}))
    }
}
