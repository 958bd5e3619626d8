//! `tidemill.v1.Inference`.

use std::{sync::Arc, time::Instant};

use tidemill_engine::{
    EngineHandle, Generation, RequestError,
    ids::{RequestId, TenantId},
    output::Embedding,
    request::{ValidatedEmbed, ValidatedRequest},
    text::TextModel,
};
use tidemill_proto::v1::{self, inference_server::Inference};
use tonic::{Request, Response, Status};

use super::{
    auth::Credential,
    call::Call,
    deadline::Deadline,
    lifecycle::{Lifecycle, Phase},
    stream::{Answer, ResponseStream},
    texts::TextWorkers,
};
use crate::convert::{self, ResponseWriter};

/// Turns prompts into tokens, or into embeddings.
#[derive(Debug)]
pub struct InferenceService {
    lifecycle: Arc<Lifecycle>,
    texts: TextWorkers,
}

impl InferenceService {
    /// A service over the server's engine.
    pub fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle, texts: TextWorkers::new() }
    }

    /// Runs the check of a request where encoding its prompt holds nobody up.
    async fn check<T: Send + 'static>(
        &self,
        check: impl FnOnce(&EngineHandle) -> Result<T, RequestError> + Send + 'static,
    ) -> Result<(EngineHandle, T), Refused> {
        let engine = self.lifecycle.engine().map_err(Refused::Status)?.clone();
        // Asked again by the engine; here it saves the time to encode the prompt.
        if self.lifecycle.phase() > Phase::Ready {
            return Err(Refused::Error(RequestError::Draining));
        }
        let checked = self.texts.run(move || check(&engine).map(|checked| (engine, checked))).await;
        checked.map_err(Refused::Error)
    }

    /// Checks a request and hands it to the engine.
    async fn admit(
        &self,
        id: RequestId,
        request: v1::GenerateRequest,
        origin: Origin,
    ) -> Result<(Generation, Admitted), Refused> {
        let (engine, validated) = self.check(move |engine| validate(engine, id, request, origin)).await?;
        let admitted = Admitted {
            prompt_tokens: validated.prompt().len(),
            prompt_logprobs: validated.sampling().prompt_logprobs.is_some(),
        };
        let generation = engine.submit(validated).map_err(Refused::Error)?;
        Ok((generation, admitted))
    }

    /// Checks a request for an embedding, hands it to the engine and waits for the answer.
    async fn embedding(
        &self,
        request: v1::EmbedRequest,
        origin: Origin,
        call: &mut Call,
    ) -> Result<Embedding, Refused> {
        let id = call.id().clone();
        let (engine, validated) =
            self.check(move |engine| validate_embed(engine, id, request, origin)).await?;
        call.prompt_tokens(validated.prompt().len());
        let pending = engine.submit_embed(validated).map_err(Refused::Error)?;
        // When the client goes away this future is dropped, and with it the request.
        pending.wait().await.map_err(Refused::Error)
    }

    /// Text work of a unary call.
    async fn with_text<T: Send + 'static>(
        &self,
        call: &Call,
        work: impl FnOnce(&TextModel, &EngineHandle) -> Result<T, RequestError> + Send + 'static,
    ) -> Result<T, Status> {
        let engine = self.lifecycle.engine()?.clone();
        let result = self.texts.run(move || work(engine.text(), &engine)).await;
        result.map_err(|error| convert::status(&error, call.id()))
    }
}

/// What a request's headers and connection say beside its message.
struct Origin {
    deadline: Option<Instant>,
    credential: Credential,
    trace_parent: Option<Arc<str>>,
}

impl Origin {
    /// Longest `traceparent` that is kept. Version 00 has 55 bytes; later ones may have more.
    const MAX_TRACE_PARENT_BYTES: usize = 128;

    fn of<T>(request: &Request<T>) -> Self {
        let trace_parent = request.metadata().get("traceparent").and_then(|value| value.to_str().ok());
        let trace_parent = trace_parent.filter(|value| value.len() <= Self::MAX_TRACE_PARENT_BYTES);
        Self {
            deadline: request.extensions().get::<Deadline>().map(|deadline| deadline.0),
            credential: Credential::of_request(request),
            trace_parent: trace_parent.map(Into::into),
        }
    }
}

/// What the stream of an admitted request needs to know of it.
struct Admitted {
    prompt_tokens: usize,
    prompt_logprobs: bool,
}

/// Why a request has no answer.
enum Refused {
    Error(RequestError),
    Status(Status),
}

impl Refused {
    fn status(self, id: &RequestId) -> Status {
        match self {
            Self::Error(error) => convert::status(&error, id),
            Self::Status(status) => status,
        }
    }
}

/// The client's name for a request, or ours.
fn request_id(given: &str) -> RequestId {
    if given.is_empty() { RequestId::random() } else { RequestId::new(given) }
}

fn validate(
    engine: &EngineHandle,
    id: RequestId,
    request: v1::GenerateRequest,
    origin: Origin,
) -> Result<ValidatedRequest, RequestError> {
    let mut request = convert::generate_request(id, request)?;
    request.deadline = origin.deadline;
    request.trace_parent = origin.trace_parent;
    if request.tenant.as_str().is_empty() {
        request.tenant = TenantId::new(origin.credential.0.clone());
    }
    request.credential = origin.credential.0;
    engine.validate(request)
}

fn validate_embed(
    engine: &EngineHandle,
    id: RequestId,
    request: v1::EmbedRequest,
    origin: Origin,
) -> Result<ValidatedEmbed, RequestError> {
    let mut request = convert::embed_request(id, request)?;
    request.deadline = origin.deadline;
    request.trace_parent = origin.trace_parent;
    if request.tenant.as_str().is_empty() {
        request.tenant = TenantId::new(origin.credential.0.clone());
    }
    request.credential = origin.credential.0;
    engine.validate_embed(request)
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = ResponseStream<v1::GenerateResponse>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let origin = Origin::of(&request);
        let request = request.into_inner();
        let id = request_id(&request.request_id);
        let mut call = Call::start("Generate", id.clone());
        match self.admit(id.clone(), request, origin).await {
            Ok((generation, admitted)) => {
                call.prompt_tokens(admitted.prompt_tokens);
                let response = call.respond(());
                let writer = ResponseWriter::new(id, admitted.prompt_logprobs);
                let answer = Answer { generation, writer, call };
                Ok(response.map(|()| answer.into_stream()))
            }
            Err(refused) => Err(call.fail(refused.status(&id))),
        }
    }

    async fn embed(&self, request: Request<v1::EmbedRequest>) -> Result<Response<v1::EmbedResponse>, Status> {
        let origin = Origin::of(&request);
        let request = request.into_inner();
        let id = request_id(&request.request_id);
        let mut call = Call::start("Embed", id.clone());
        let result = self.embedding(request, origin, &mut call).await;
        call.end(match result {
            Ok(embedding) => Ok(convert::embed_response(&id, embedding)),
            Err(refused) => Err(refused.status(&id)),
        })
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let call = Call::start("Tokenize", RequestId::random());
        let request = request.into_inner();
        let result = self.with_text(&call, |text, engine| tokenize(text, engine, request)).await;
        call.end(result)
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let call = Call::start("Detokenize", RequestId::random());
        let request = request.into_inner();
        let result = self.with_text(&call, |text, _| detokenize(text, request)).await;
        call.end(result)
    }

    async fn get_model(
        &self,
        _: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let call = Call::start("GetModel", RequestId::random());
        let model = self.lifecycle.engine().map(|engine| convert::model_response(engine.info()));
        call.end(model)
    }
}

/// Longest text in bytes that `Tokenize` encodes: some seconds of work.
const MAX_TOKENIZE_BYTES: usize = 4 << 20;

/// Most tokens that `Detokenize` decodes: a text of some megabytes.
const MAX_DETOKENIZE_IDS: usize = 1 << 20;

fn detokenize(
    text: &TextModel,
    request: v1::DetokenizeRequest,
) -> Result<v1::DetokenizeResponse, RequestError> {
    let count = request.token_ids.len();
    if count > MAX_DETOKENIZE_IDS {
        let message = format!("has {count} ids; at most {MAX_DETOKENIZE_IDS} are decoded");
        return Err(RequestError::invalid("token_ids", message));
    }
    let ids = convert::token_ids(request.token_ids);
    Ok(v1::DetokenizeResponse { text: text.decode(&ids, request.include_special_tokens)? })
}

fn tokenize(
    text: &TextModel,
    engine: &EngineHandle,
    request: v1::TokenizeRequest,
) -> Result<v1::TokenizeResponse, RequestError> {
    use v1::tokenize_request::Input;
    let (field, content, add_special) = match request.input {
        Some(Input::Text(content)) => ("text", content, request.add_special_tokens.unwrap_or(true)),
        // The template writes special tokens itself.
        Some(Input::Chat(chat)) => ("chat", text.render_chat(&convert::chat_prompt(chat, "chat")?)?, false),
        None => return Err(RequestError::invalid("input", "is absent; set text or chat")),
    };
    if content.len() > MAX_TOKENIZE_BYTES {
        let message = format!("has {} bytes; at most {MAX_TOKENIZE_BYTES} are encoded", content.len());
        return Err(RequestError::invalid(field, message));
    }
    let ids = text.encode(&content, add_special)?;
    Ok(v1::TokenizeResponse {
        token_ids: ids.into_iter().map(|id| id.0).collect(),
        text: content,
        max_model_len: engine.info().max_model_len as u32,
    })
}
