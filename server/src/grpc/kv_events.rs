//! Changes of the prefix cache as a response stream.

use std::{collections::VecDeque, sync::Arc};

use futures_util::stream;
use tidemill_engine::{EngineHandle, KvWatch, ids::RequestId, kv::KvEventBatch};
use tonic::Status;

use super::{call::Call, lifecycle::Lifecycle, stream::ResponseStream};
use crate::convert;

/// A watcher of the prefix cache; `F` makes messages of a batch, at least one.
pub struct KvEvents<F> {
    /// Whose cache.
    pub engine: EngineHandle,
    /// Its changes.
    pub watch: KvWatch,
    /// How they become messages.
    pub to_messages: F,
    /// Ends the stream with the server.
    pub lifecycle: Arc<Lifecycle>,
    /// The log line.
    pub call: Call,
}

impl<F, M> KvEvents<F>
where
    F: FnMut(KvEventBatch) -> Vec<M> + Send + 'static,
    M: Send + 'static,
{
    /// The snapshot and the changes after it, until the client goes, falls behind, or the server stops.
    pub fn into_stream(self) -> ResponseStream<M> {
        let state = Some((self, VecDeque::new()));
        Box::pin(stream::unfold(state, |state| async {
            let (mut events, mut ready) = state?;
            if ready.is_empty() {
                match events.next().await {
                    Ok(Some(messages)) => ready = messages,
                    Ok(None) => return None,
                    // A status is the last thing a stream gives.
                    Err(status) => return Some((Err(status), None)),
                }
            }
            let message = ready.pop_front()?;
            Some((Ok(message), Some((events, ready))))
        }))
    }

    /// The messages of the next batch, at least one. Nothing when the server stops.
    async fn next(&mut self) -> Result<Option<VecDeque<M>>, Status> {
        let batch = tokio::select! {
            biased;
            () = self.lifecycle.stopped() => {
                self.call.succeed();
                return Ok(None);
            }
            batch = self.watch.next() => batch,
        };
        match batch {
            Some(batch) => Ok(Some((self.to_messages)(batch).into())),
            None => Err(self.cut_off().await),
        }
    }

    /// Why there is nothing more to watch.
    async fn cut_off(&mut self) -> Status {
        let status = if self.engine.is_stopped() {
            let id: &RequestId = self.call.id();
            convert::status(&self.engine.stopped().await.error(), id)
        } else {
            Status::aborted(
                "this watcher fell behind and was cut off; watch again, and start from the new snapshot",
            )
        };
        self.call.fail(status)
    }
}
