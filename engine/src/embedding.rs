//! The caller's side of a request that samples nothing: one pooled state, and what is made of it here, off the engine thread.

use std::{sync::Arc, time::Instant};

use crate::{
    core::Command,
    error::RequestError,
    event::Event,
    generation::Stream,
    handle::EngineHandle,
    heads::Heads,
    ids::RequestId,
    output::{Embedding, Score, Usage},
    pooling::normalize,
    request::EmbeddingShape,
};

/// A pooled state that is under way. Dropping it before it is there aborts the request.
#[derive(Debug)]
struct PendingState {
    id: RequestId,
    stream: Stream,
    handle: EngineHandle,
    over: bool,
}

impl PendingState {
    async fn wait(mut self) -> Result<(Vec<f32>, Usage), RequestError> {
        let event = self.stream.events.recv().await.ok();
        self.state(event)
    }

    fn wait_blocking(mut self) -> Result<(Vec<f32>, Usage), RequestError> {
        let event = self.stream.events.recv_blocking().ok();
        self.state(event)
    }

    fn state(&mut self, event: Option<Event>) -> Result<(Vec<f32>, Usage), RequestError> {
        // Whatever the first event is, it is the only one.
        self.over = true;
        match event {
            Some(Event::Embedding { values, usage }) => Ok((values, usage)),
            Some(Event::Finished { .. }) => Err(RequestError::Aborted),
            Some(Event::Failed(error)) => Err(error),
            Some(Event::Token { .. } | Event::PromptLogprobs(_)) => {
                Err(RequestError::Internal("a token for an embedding".into()))
            }
            None => Err(self.handle.stop_reason().error()),
        }
    }
}

impl Drop for PendingState {
    fn drop(&mut self) {
        if !self.over {
            // Fails only when the engine is gone, and everything with it.
            let (ticket, received) = (self.stream.ticket, Instant::now());
            drop(self.handle.commands.send(Command::Drop { ticket, received }));
        }
    }
}

/// A head may make numbers of a state that are none.
fn finite(values: &[f32], usage: &Usage) -> Result<(), RequestError> {
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(RequestError::NotFinite { position: usage.prompt_tokens }),
    }
}

/// The answer to one request for an embedding, which is under way. Dropping it before it is there aborts the request.
#[derive(Debug)]
pub struct PendingEmbedding {
    state: PendingState,
    heads: Arc<Heads>,
    shape: EmbeddingShape,
}

impl PendingEmbedding {
    pub(crate) fn new(id: RequestId, shape: EmbeddingShape, stream: Stream, handle: EngineHandle) -> Self {
        let heads = handle.heads();
        Self { state: PendingState { id, stream, handle, over: false }, heads, shape }
    }

    /// The request's id.
    pub fn id(&self) -> &RequestId {
        &self.state.id
    }

    /// Waits for the embedding. Dropping the future aborts the request.
    ///
    /// # Errors
    /// Why there is none: [`RequestError::Aborted`] when somebody aborted it by its id, and whatever ends a request in an error.
    pub async fn wait(self) -> Result<Embedding, RequestError> {
        let state = self.state.wait().await?;
        embedding(&self.heads, self.shape, state)
    }

    /// [`wait`](Self::wait) for callers without an async runtime.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_blocking(self) -> Result<Embedding, RequestError> {
        let state = self.state.wait_blocking()?;
        embedding(&self.heads, self.shape, state)
    }
}

fn embedding(
    heads: &Heads,
    shape: EmbeddingShape,
    (state, usage): (Vec<f32>, Usage),
) -> Result<Embedding, RequestError> {
    let mut values = heads.embed.apply(state);
    values.truncate(shape.dimensions);
    if shape.normalize {
        normalize(&mut values);
    }
    finite(&values, &usage)?;
    Ok(Embedding { values, prompt_tokens: usage.prompt_tokens, cached_tokens: usage.cached_tokens })
}

/// The score of one pair of texts, which is under way. Dropping it before it is there aborts the request.
#[derive(Debug)]
pub struct PendingScore {
    state: PendingState,
    heads: Arc<Heads>,
    use_activation: bool,
}

impl PendingScore {
    pub(crate) fn new(id: RequestId, use_activation: bool, stream: Stream, handle: EngineHandle) -> Self {
        let heads = handle.heads();
        Self { state: PendingState { id, stream, handle, over: false }, heads, use_activation }
    }

    /// The request's id.
    pub fn id(&self) -> &RequestId {
        &self.state.id
    }

    /// Waits for the score. Dropping the future aborts the request.
    ///
    /// # Errors
    /// As [`PendingEmbedding::wait`].
    pub async fn wait(self) -> Result<Score, RequestError> {
        let state = self.state.wait().await?;
        score(&self.heads, self.use_activation, state)
    }

    /// [`wait`](Self::wait) for callers without an async runtime.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_blocking(self) -> Result<Score, RequestError> {
        let state = self.state.wait_blocking()?;
        score(&self.heads, self.use_activation, state)
    }
}

fn score(
    heads: &Heads,
    use_activation: bool,
    (state, usage): (Vec<f32>, Usage),
) -> Result<Score, RequestError> {
    let Some(scorer) = &heads.scorer else {
        return Err(RequestError::Internal("a score of a model that gives none".into()));
    };
    let value = scorer.score(state, use_activation);
    finite(&[value], &usage)?;
    Ok(Score { value, prompt_tokens: usage.prompt_tokens, cached_tokens: usage.cached_tokens })
}
