//! The caller's side of a request for an embedding: one answer, cut and normalised here, off the engine thread.

use std::time::Instant;

use crate::{
    core::Command, error::RequestError, event::Event, generation::Stream, handle::EngineHandle,
    ids::RequestId, output::Embedding, pooling::normalize, request::EmbeddingShape,
};

/// The answer to one request for an embedding, which is under way. Dropping it before it is there aborts the request.
#[derive(Debug)]
pub struct PendingEmbedding {
    id: RequestId,
    stream: Stream,
    handle: EngineHandle,
    shape: EmbeddingShape,
    over: bool,
}

impl PendingEmbedding {
    pub(crate) fn new(id: RequestId, shape: EmbeddingShape, stream: Stream, handle: EngineHandle) -> Self {
        Self { id, stream, handle, shape, over: false }
    }

    /// The request's id.
    pub fn id(&self) -> &RequestId {
        &self.id
    }

    /// Waits for the embedding. Dropping the future aborts the request.
    ///
    /// # Errors
    /// Why there is none: [`RequestError::Aborted`] when somebody aborted it by its id, and whatever ends a request in an error.
    pub async fn wait(mut self) -> Result<Embedding, RequestError> {
        let event = self.stream.events.recv().await.ok();
        self.answer(event)
    }

    /// [`wait`](Self::wait) for callers without an async runtime.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_blocking(mut self) -> Result<Embedding, RequestError> {
        let event = self.stream.events.recv_blocking().ok();
        self.answer(event)
    }

    fn answer(&mut self, event: Option<Event>) -> Result<Embedding, RequestError> {
        // Whatever the first event is, it is the only one.
        self.over = true;
        match event {
            Some(Event::Embedding { mut values, usage }) => {
                values.truncate(self.shape.dimensions);
                if self.shape.normalize {
                    normalize(&mut values);
                }
                let (prompt_tokens, cached_tokens) = (usage.prompt_tokens, usage.cached_tokens);
                Ok(Embedding { values, prompt_tokens, cached_tokens })
            }
            Some(Event::Finished { .. }) => Err(RequestError::Aborted),
            Some(Event::Failed(error)) => Err(error),
            Some(Event::Token { .. } | Event::PromptLogprobs(_)) => {
                Err(RequestError::Internal("a token for an embedding".into()))
            }
            None => Err(self.handle.stop_reason().error()),
        }
    }
}

impl Drop for PendingEmbedding {
    fn drop(&mut self) {
        if !self.over {
            // Fails only when the engine is gone, and everything with it.
            let (ticket, received) = (self.stream.ticket, Instant::now());
            drop(self.handle.commands.send(Command::Drop { ticket, received }));
        }
    }
}
