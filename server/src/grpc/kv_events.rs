//! Changes of the prefix cache as a response stream.

use std::{collections::VecDeque, sync::Arc};

use futures_util::stream;
use tidemill_engine::{EngineHandle, KvWatch, ids::RequestId};
use tidemill_proto::v1;
use tonic::Status;

use super::{call::Call, lifecycle::Lifecycle, stream::ResponseStream};
use crate::convert;

/// A watcher of the prefix cache.
pub struct KvEvents {
    /// Whose cache.
    pub engine: EngineHandle,
    /// Its changes.
    pub watch: KvWatch,
    /// Whether the client wants token ids.
    pub include_token_ids: bool,
    /// Ends the stream with the server.
    pub lifecycle: Arc<Lifecycle>,
    /// The log line.
    pub call: Call,
}

impl KvEvents {
    /// The snapshot and the changes after it, until the client goes, falls behind, or the server stops.
    pub fn into_stream(self) -> ResponseStream<v1::WatchKvEventsResponse> {
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
    async fn next(&mut self) -> Result<Option<VecDeque<v1::WatchKvEventsResponse>>, Status> {
        let batch = tokio::select! {
            biased;
            () = self.lifecycle.stopped() => {
                self.call.succeed();
                return Ok(None);
            }
            batch = self.watch.next() => batch,
        };
        match batch {
            Some(batch) => Ok(Some(convert::kv_event_messages(batch, self.include_token_ids).into())),
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
