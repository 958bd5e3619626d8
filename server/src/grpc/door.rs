//! The way of a request from the wire to the engine, the same for every protocol.

use std::{sync::Arc, time::Instant};

use tidemill_engine::{
    EngineHandle, Generation, RequestError,
    ids::{RequestId, TenantId, TokenId},
    output::{Embedding, Score},
    request::{EmbedRequest, GenerateRequest, ScoreRequest},
    text::TextModel,
};
use tonic::{Request, Status};

use super::{
    auth::Credential,
    call::Call,
    deadline::Deadline,
    lifecycle::{Lifecycle, Phase},
    texts::TextWorkers,
};
use crate::convert;

/// The engine, and the threads on which text is encoded for it.
#[derive(Debug, Clone)]
pub struct Door {
    lifecycle: Arc<Lifecycle>,
    texts: TextWorkers,
}

/// A request that the engine has taken.
pub struct Admitted {
    /// Its outputs.
    pub generation: Generation,
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// The prompt's first token: there is no log-probability for it.
    pub first_prompt_token: TokenId,
    /// The prompt's log-probabilities were asked for.
    pub prompt_logprobs: bool,
    /// The prompt ends within the model's thoughts.
    pub opens_thinking: bool,
}

impl Door {
    /// The door to the server's engine.
    pub fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle, texts: TextWorkers::default() }
    }

    /// Where the server is in its life.
    pub fn lifecycle(&self) -> &Arc<Lifecycle> {
        &self.lifecycle
    }

    /// The engine, once there is one.
    ///
    /// # Errors
    /// UNAVAILABLE while loading.
    pub fn engine(&self) -> Result<&EngineHandle, Status> {
        self.lifecycle.engine()
    }

    /// Checks a request and hands it to the engine; `read` makes it of the message, on a thread for text.
    ///
    /// # Errors
    /// What is wrong with it, or why the engine does not take it.
    pub async fn admit(
        &self,
        id: &RequestId,
        origin: Origin,
        read: impl FnOnce() -> Result<GenerateRequest, RequestError> + Send + 'static,
    ) -> Result<Admitted, Status> {
        let refused = |error: RequestError| convert::status(&error, id);
        let check = move |engine: &EngineHandle| {
            let mut request = read()?;
            request.deadline = origin.deadline;
            request.tenant = origin.tenant(request.tenant);
            request.trace_parent = origin.trace_parent;
            request.credential = origin.credential.speaking_for(&request.credential);
            engine.validate(request)
        };
        let (engine, validated) = self.check(id, check).await?;
        let prompt = validated.prompt();
        let (prompt_tokens, first_prompt_token) = (prompt.len(), prompt[0]);
        let prompt_logprobs = validated.sampling().prompt_logprobs.is_some();
        let opens_thinking = validated.opens_thinking();
        let generation = engine.submit(validated).map_err(refused)?;
        Ok(Admitted { generation, prompt_tokens, first_prompt_token, prompt_logprobs, opens_thinking })
    }

    /// Checks a request for an embedding, hands it to the engine and waits for the answer. When the client goes away this future is
    /// dropped, and with it the request.
    ///
    /// # Errors
    /// What is wrong with it, or why the engine does not answer it.
    pub async fn embed(
        &self,
        call: &mut Call,
        origin: Origin,
        read: impl FnOnce() -> Result<EmbedRequest, RequestError> + Send + 'static,
    ) -> Result<Embedding, Status> {
        let id = call.id().clone();
        let refused = |error: RequestError| convert::status(&error, &id);
        let check = move |engine: &EngineHandle| {
            let mut request = read()?;
            request.deadline = origin.deadline;
            request.tenant = origin.tenant(request.tenant);
            request.trace_parent = origin.trace_parent;
            request.credential = origin.credential.speaking_for(&request.credential);
            engine.validate_embed(request)
        };
        let (engine, validated) = self.check(&id, check).await?;
        call.prompt_tokens(validated.prompt().len());
        engine.submit_embed(validated).map_err(refused)?.wait().await.map_err(refused)
    }

    /// As [`Self::embed`], for a score.
    ///
    /// # Errors
    /// As there.
    pub async fn score(
        &self,
        call: &mut Call,
        origin: Origin,
        read: impl FnOnce() -> Result<ScoreRequest, RequestError> + Send + 'static,
    ) -> Result<Score, Status> {
        let id = call.id().clone();
        let refused = |error: RequestError| convert::status(&error, &id);
        let check = move |engine: &EngineHandle| {
            let mut request = read()?;
            request.deadline = origin.deadline;
            request.tenant = origin.tenant(request.tenant);
            request.trace_parent = origin.trace_parent;
            request.credential = origin.credential.speaking_for(&request.credential);
            engine.validate_score(request)
        };
        let (engine, validated) = self.check(&id, check).await?;
        call.prompt_tokens(validated.prompt().len());
        engine.submit_score(validated).map_err(refused)?.wait().await.map_err(refused)
    }

    /// Runs the check of a request where encoding its prompt holds nobody up.
    async fn check<T: Send + 'static>(
        &self,
        id: &RequestId,
        check: impl FnOnce(&EngineHandle) -> Result<T, RequestError> + Send + 'static,
    ) -> Result<(EngineHandle, T), Status> {
        let refused = |error: RequestError| convert::status(&error, id);
        let engine = self.engine()?.clone();
        // Asked again by the engine; here it saves the time to encode the prompt.
        if self.lifecycle.phase() > Phase::Ready {
            return Err(refused(RequestError::Draining));
        }
        self.texts.run(move || check(&engine).map(|checked| (engine, checked))).await.map_err(refused)
    }

    /// Text work of a unary call.
    ///
    /// # Errors
    /// UNAVAILABLE while loading; what `work` returned.
    pub async fn with_text<T: Send + 'static>(
        &self,
        call: &Call,
        work: impl FnOnce(&TextModel, &EngineHandle) -> Result<T, RequestError> + Send + 'static,
    ) -> Result<T, Status> {
        let engine = self.engine()?.clone();
        let result = self.texts.run(move || work(engine.text(), &engine)).await;
        result.map_err(|error| convert::status(&error, call.id()))
    }
}

/// What a request's headers and connection say beside its message.
pub struct Origin {
    deadline: Option<Instant>,
    credential: Credential,
    trace_parent: Option<Arc<str>>,
}

impl Origin {
    /// Longest `traceparent` that is kept. Version 00 has 55 bytes; later ones may have more.
    const MAX_TRACE_PARENT_BYTES: usize = 128;

    /// Where this request came from.
    pub fn of<T>(request: &Request<T>) -> Self {
        let trace_parent = request.metadata().get("traceparent").and_then(|value| value.to_str().ok());
        let trace_parent = trace_parent.filter(|value| value.len() <= Self::MAX_TRACE_PARENT_BYTES);
        Self {
            deadline: request.extensions().get::<Deadline>().map(|deadline| deadline.0),
            credential: Credential::of_request(request),
            trace_parent: trace_parent.map(Into::into),
        }
    }

    /// The tenant that a request named, or else its credential.
    fn tenant(&self, named: TenantId) -> TenantId {
        if named.as_str().is_empty() { TenantId::new(self.credential.0.clone()) } else { named }
    }
}

/// The id that a request gave itself, or one of ours.
pub fn request_id(given: &str) -> RequestId {
    match given {
        "" => RequestId::random(),
        id => RequestId::new(id),
    }
}
