//! An engine behind gRPC: `tidemill.v1` in place of calls.
//!
//! `channel` is the connection; `watch` finds out, in the background, whether there is an engine and what it has loaded; `link` holds what it
//! found; `drain` counts streams, so that a gateway can go down in peace; `stream` is one answer.

mod channel;
mod drain;
mod link;
mod stream;
mod watch;

use std::{
    error::Error,
    sync::Arc,
    time::{Duration, Instant},
};

use tidemill_engine::{
    AdapterInfo, EngineStats, ErrorCode, RequestError,
    activity::Activity,
    ids::{RequestId, TokenId},
    output::{AbortReceipt, AbortStage, Embedding, Score},
    request::{EmbedRequest, GenerateRequest, ScoreRequest},
};
use tidemill_proto::v1::{
    self, control_client::ControlClient, inference_client::InferenceClient, tokenize_request::Input,
};
use tokio::task::AbortHandle;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use self::{
    channel::{Channel, connect},
    drain::Drain,
    link::Link,
    stream::Answer,
    watch::Watch,
};
use super::{Accepted, CallError, EngineClient, ModelCard, TokenizeInput, Tokenized};
use crate::{
    config::EngineAddress,
    convert::remote as convert,
    exit::Failure,
    grpc::{OPENS_THINKING, PROMPT_TOKENS, Phase, REQUEST_ID},
};

/// Largest message in bytes, either way: what the server accepts.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// An engine in another process.
#[derive(Debug)]
pub struct RemoteEngine {
    inference: InferenceClient<Channel>,
    control: ControlClient<Channel>,
    link: Arc<Link>,
    drain: Drain,
    watching: AbortHandle,
}

impl RemoteEngine {
    /// The engine at this address, which need not be there yet. It is looked for from now on, and again whenever it is lost, by a task of
    /// the runtime in which this is called.
    ///
    /// # Errors
    /// Wrong usage when the address, the key or the certificate cannot be used.
    pub fn new(address: &EngineAddress) -> Result<Self, Failure> {
        let channel = connect(address)?;
        let inference = InferenceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let control = ControlClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let link = Arc::new(Link::default());
        let watch = Watch::new(channel, inference.clone(), link.clone());
        let watching = tokio::spawn(watch.run()).abort_handle();
        Ok(Self { inference, control, link, drain: Drain::default(), watching })
    }

    /// Refuses new requests from now on.
    pub fn refuse_new_requests(&self) {
        self.drain.begin();
    }

    /// Waits until the running requests have ended; what is left after `grace` is cut off. The number of those that were.
    pub async fn drained(&self, grace: Duration) -> usize {
        self.drain.end(grace).await
    }
}

impl Drop for RemoteEngine {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

#[tonic::async_trait]
impl EngineClient for RemoteEngine {
    fn phase(&self) -> Phase {
        if self.drain.is_under_way() { Phase::Draining } else { self.link.phase() }
    }

    fn is_healthy(&self) -> bool {
        self.phase() == Phase::Ready
    }

    fn model(&self) -> Result<Arc<ModelCard>, CallError> {
        self.link.card()
    }

    async fn generate(&self, request: GenerateRequest) -> Result<Accepted, CallError> {
        let place = self.drain.enter().ok_or(RequestError::Draining)?;
        self.link.card()?;
        let completions = request.sampling.n.unwrap_or(1);
        let (given, deadline) = (request.id.clone(), request.deadline);
        let trace_parent = request.trace_parent.clone();
        let call = call(convert::generate_message(request), deadline, trace_parent)?;
        let response = self.inference.clone().generate(call).await;
        let response = response.map_err(|status| failure(&status, deadline))?;
        let number = |name| -> Result<usize, CallError> {
            let value = text(response.metadata(), name).and_then(|value| value.parse().ok());
            value.ok_or_else(|| {
                CallError::internal(&format!(
                    "the engine's answer has no {name}; run the gateway's version of it"
                ))
            })
        };
        let (prompt_tokens, opens_thinking) = (number(PROMPT_TOKENS)?, number(OPENS_THINKING)? == 1);
        let id = text(response.metadata(), REQUEST_ID).map(RequestId::new).or(given);
        let id = id.ok_or_else(|| CallError::internal("the engine's answer has no id"))?;
        let answer = Answer::new(response.into_inner(), completions, deadline, place);
        Ok(Accepted { id, prompt_tokens, opens_thinking, outputs: Box::pin(answer) })
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embedding, CallError> {
        let _place = self.drain.enter().ok_or(RequestError::Draining)?;
        self.link.card()?;
        let (deadline, trace_parent) = (request.deadline, request.trace_parent.clone());
        let call = call(convert::embed_message(request)?, deadline, trace_parent)?;
        // A future that is dropped takes the call with it, and the engine aborts the request.
        let response = self.inference.clone().embed(call).await;
        let response = response.map_err(|status| failure(&status, deadline))?;
        Ok(convert::embedding(response.into_inner()))
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score, CallError> {
        let _place = self.drain.enter().ok_or(RequestError::Draining)?;
        self.link.card()?;
        let (deadline, trace_parent) = (request.deadline, request.trace_parent.clone());
        let call = call(convert::score_message(request), deadline, trace_parent)?;
        let response = self.inference.clone().score(call).await;
        let response = response.map_err(|status| failure(&status, deadline))?;
        Ok(convert::score(response.into_inner()))
    }

    async fn tokenize(&self, input: TokenizeInput) -> Result<Tokenized, CallError> {
        self.link.card()?;
        let request = match input {
            TokenizeInput::Text(text, special) => {
                v1::TokenizeRequest { input: Some(Input::Text(text)), add_special_tokens: Some(special) }
            }
            TokenizeInput::Chat(chat) => v1::TokenizeRequest {
                input: Some(Input::Chat(convert::chat_message(chat))),
                add_special_tokens: None,
            },
        };
        let answer = self.inference.clone().tokenize(request).await.map_err(|status| {
            convert::call_error_of(&status, |field| match field {
                "text" => "prompt",
                "chat" => "messages",
                other => other,
            })
        })?;
        let v1::TokenizeResponse { token_ids, text, max_model_len: _ } = answer.into_inner();
        Ok(Tokenized { ids: token_ids.into_iter().map(TokenId).collect(), text })
    }

    async fn detokenize(&self, ids: Vec<TokenId>, special: bool) -> Result<String, CallError> {
        self.link.card()?;
        let token_ids = ids.into_iter().map(|id| id.0).collect();
        let request = v1::DetokenizeRequest { token_ids, include_special_tokens: special };
        Ok(answer(self.inference.clone().detokenize(request).await)?.text)
    }

    async fn abort(&self, id: RequestId) -> Result<AbortReceipt, CallError> {
        self.link.card()?;
        // On the wire an id that no request can have is an error.
        if !(1..=RequestId::MAX_BYTES).contains(&id.as_str().len()) {
            return Ok(unknown(id));
        }
        let request = v1::AbortRequest { request_id: id.as_str().to_owned() };
        convert::abort_receipt(answer(self.control.clone().abort(request).await)?)
    }

    async fn adapters(&self) -> Result<Vec<AdapterInfo>, CallError> {
        self.link.card()?;
        let model = answer(self.inference.clone().get_model(v1::GetModelRequest {}).await)?;
        Ok(convert::adapters(model.adapters))
    }

    async fn load_adapter(&self, lora_name: String, lora_path: String) -> Result<(), CallError> {
        self.link.card()?;
        let request = v1::LoadAdapterRequest { lora_name, lora_path };
        answer(self.control.clone().load_adapter(request).await).map(drop)
    }

    async fn unload_adapter(&self, lora_name: String) -> Result<(), CallError> {
        self.link.card()?;
        let request = v1::UnloadAdapterRequest { lora_name };
        answer(self.control.clone().unload_adapter(request).await).map(drop)
    }

    async fn stats(&self) -> Result<EngineStats, CallError> {
        self.link.card()?;
        let stats = answer(self.control.clone().get_stats(v1::GetStatsRequest {}).await)?.stats;
        convert::engine_stats(stats.unwrap_or_default())
    }

    async fn activity(&self) -> Result<Activity, CallError> {
        self.link.card()?;
        // The first reading comes at once; the stream ends when it is dropped.
        let request = v1::WatchActivityRequest::default();
        let mut readings = answer(self.control.clone().watch_activity(request).await)?;
        let reading = readings.message().await.map_err(|status| convert::call_error(&status))?;
        let activity = reading.and_then(|reading| reading.activity);
        convert::activity(activity.ok_or_else(CallError::unreachable)?)
    }
}

/// A message with what travels in headers.
fn call<T>(
    message: T,
    deadline: Option<Instant>,
    trace_parent: Option<Arc<str>>,
) -> Result<Request<T>, CallError> {
    let mut call = Request::new(message);
    if let Some(deadline) = deadline {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(RequestError::DeadlineExceeded { completion_tokens: 0 }.into());
        }
        call.set_timeout(left);
    }
    // One that no header can carry means nothing to anybody.
    if let Some(value) = trace_parent.and_then(|value| value.parse().ok()) {
        call.metadata_mut().insert("traceparent", value);
    }
    Ok(call)
}

/// Why a call failed. The connection has a timer of its own for the deadline, and cancels when it fires.
fn failure(status: &Status, deadline: Option<Instant>) -> CallError {
    if status.source().is_some() && deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        return CallError::new(ErrorCode::DeadlineExceeded, "the deadline passed before the engine was done");
    }
    convert::call_error(status)
}

fn answer<T>(result: Result<Response<T>, Status>) -> Result<T, CallError> {
    result.map(Response::into_inner).map_err(|status| convert::call_error(&status))
}

fn text<'a>(metadata: &'a MetadataMap, name: &str) -> Option<&'a str> {
    metadata.get(name)?.to_str().ok()
}

fn unknown(id: RequestId) -> AbortReceipt {
    AbortReceipt {
        id,
        stage: AbortStage::Unknown,
        completion_tokens: 0,
        blocks_freed: 0,
        rows_freed: 0,
        time_to_free: Duration::ZERO,
    }
}
