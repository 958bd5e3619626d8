//! Who is told what the prefix cache holds.

use super::Core;
use crate::{
    error::RequestError,
    handle::KvWatch,
    kv::{BlockPool, KvEvent, KvEventBatch},
};

/// Batches that a watcher may be behind before it is cut off.
const MAX_BEHIND: usize = 1024;

/// Those who watch, and the number of the last batch.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    sequence: u64,
    watchers: Vec<async_channel::Sender<KvEventBatch>>,
    /// Empty between uses; its memory is kept.
    events: Vec<KvEvent>,
}

impl Watchers {
    /// Sends out what has changed since the last call. A watcher that is too far behind is cut off: its next batch would leave a gap, and waiting
    /// for it would make requests wait.
    pub(super) fn report(&mut self, pool: &BlockPool) {
        pool.take_events(&mut self.events);
        if self.events.is_empty() {
            return;
        }
        self.sequence += 1;
        if !self.watchers.is_empty() {
            let batch =
                KvEventBatch { sequence: self.sequence, is_snapshot: false, events: self.events.clone() };
            self.watchers.retain(|watcher| watcher.try_send(batch.clone()).is_ok());
        }
        self.events.clear();
    }

    /// Another watcher: it gets everything that is there, and then the changes.
    fn add(&mut self, pool: &BlockPool) -> KvWatch {
        // What happened before the snapshot is in it.
        self.report(pool);
        let (watcher, batches) = async_channel::bounded(MAX_BEHIND);
        let snapshot = KvEventBatch { sequence: self.sequence, is_snapshot: true, events: pool.snapshot() };
        // It has room for one.
        drop(watcher.try_send(snapshot));
        self.watchers.push(watcher);
        KvWatch { batches }
    }
}

impl Core {
    pub(super) fn watch_kv(&mut self) -> Result<KvWatch, RequestError> {
        if self.settings.kv_cache_events {
            return Ok(self.watchers.add(&self.pool));
        }
        Err(RequestError::Unsupported(
            "KV cache events are off; start the server with --enable-kv-cache-events".into(),
        ))
    }
}
