//! Changes of the prefix cache for a gateway's index.

use tidemill_engine::kv::{self, BlockHash, KvEvent};
use tidemill_proto::smg::grpc::common::{
    KvBlock, KvBlocksRemoved, KvBlocksStored, KvCacheCleared, KvCacheEvent, KvEventBatch, KvSnapshotChunk,
    kv_cache_event::Data,
};

use crate::clock::since_1970;

/// Estimated size at which a part of a snapshot is full. Clients take 4 MiB by default.
const CHUNK_BYTES: usize = 1 << 20;
/// What a block takes without its token ids.
const BLOCK_BYTES: usize = 24;
/// What a token id takes at most.
const TOKEN_BYTES: usize = 5;

/// Writes the batches of one subscriber.
#[derive(Debug)]
pub struct KvEventWriter {
    block_size: i32,
    last_event: u64,
}

impl KvEventWriter {
    /// A writer for an engine with blocks of this size.
    pub fn new(block_size: usize) -> Self {
        Self { block_size: super::int32(block_size), last_event: 0 }
    }

    /// The messages of a batch: one for changes, one or more for a snapshot.
    pub fn messages(&mut self, batch: kv::KvEventBatch) -> Vec<KvEventBatch> {
        // Numbers begin with 1 here: 0 is what a subscriber says that has seen none.
        let sequence = batch.sequence + 1;
        if batch.is_snapshot {
            return self.snapshot(sequence, &batch.events);
        }
        let mut events = Vec::new();
        for data in self.data(&batch.events) {
            self.last_event += 1;
            events.push(KvCacheEvent { event_id: self.last_event, data: Some(data) });
        }
        vec![KvEventBatch {
            sequence_number: sequence,
            timestamp: since_1970().as_secs_f64(),
            events,
            snapshot: None,
        }]
    }

    /// What is stored, in chunks whose numbers end with the snapshot's own.
    fn snapshot(&self, sequence: u64, stored: &[KvEvent]) -> Vec<KvEventBatch> {
        let bytes = BLOCK_BYTES + TOKEN_BYTES * self.block_size as usize;
        let wanted = (stored.len() * bytes).div_ceil(CHUNK_BYTES);
        // Each chunk needs a number of its own, and numbers begin with 1.
        let count = (wanted as u64).clamp(1, sequence);
        let per_chunk = (stored.len() as u64).div_ceil(count).max(1) as usize;
        let mut parts: Vec<&[KvEvent]> = stored.chunks(per_chunk).collect();
        if parts.is_empty() {
            parts.push(&[]);
        }
        let count = parts.len() as u64;
        let chunk = |(index, part): (usize, &[KvEvent])| {
            let cleared = (index == 0).then_some(Data::Cleared(KvCacheCleared {}));
            let events = cleared.into_iter().chain(self.data(part));
            KvEventBatch {
                sequence_number: sequence - (count - 1 - index as u64),
                timestamp: since_1970().as_secs_f64(),
                events: events.map(|data| KvCacheEvent { event_id: 0, data: Some(data) }).collect(),
                snapshot: Some(KvSnapshotChunk {
                    index: index as u32,
                    count: count as u32,
                    blocks: stored.len() as u64,
                }),
            }
        };
        parts.into_iter().enumerate().map(chunk).collect()
    }

    /// Events in order; blocks that follow each other become one event, and so do removals.
    fn data(&self, events: &[KvEvent]) -> Vec<Data> {
        let mut data: Vec<Data> = Vec::new();
        for event in events {
            match (event, data.last_mut()) {
                (KvEvent::Stored { hash, parent, tokens }, last) => {
                    let block = KvBlock {
                        block_hash: number(*hash),
                        token_ids: tokens.iter().map(|id| id.0).collect(),
                        block_size: self.block_size,
                    };
                    let parent = parent.map(number);
                    match last {
                        Some(Data::Stored(run))
                            if parent.is_some() && run.blocks.last().map(|b| b.block_hash) == parent =>
                        {
                            run.blocks.push(block);
                        }
                        _ => data.push(Data::Stored(KvBlocksStored {
                            blocks: vec![block],
                            parent_block_hash: parent,
                        })),
                    }
                }
                (KvEvent::Removed { hash }, Some(Data::Removed(removed))) => {
                    removed.block_hashes.push(number(*hash));
                }
                (KvEvent::Removed { hash }, _) => {
                    data.push(Data::Removed(KvBlocksRemoved { block_hashes: vec![number(*hash)] }));
                }
                (KvEvent::Cleared, _) => data.push(Data::Cleared(KvCacheCleared {})),
            }
        }
        data
    }
}

/// A block's name in a field of 64 bits. The hash is keyed and uniform, so its beginning names a block as well as anything of that size.
fn number(hash: BlockHash) -> i64 {
    let [a, b, c, d, e, f, g, h, ..] = hash.0;
    i64::from_be_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use tidemill_engine::ids::TokenId;

    use super::*;

    fn hash(number: u64) -> BlockHash {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        BlockHash(bytes)
    }

    fn stored(number: u64, parent: Option<u64>) -> KvEvent {
        KvEvent::Stored {
            hash: hash(number),
            parent: parent.map(hash),
            tokens: vec![TokenId(number as u32); 4],
        }
    }

    fn batch(sequence: u64, is_snapshot: bool, events: Vec<KvEvent>) -> kv::KvEventBatch {
        kv::KvEventBatch { sequence, is_snapshot, events }
    }

    #[test]
    fn chains_and_removals_become_one_event_each_and_order_is_kept() {
        let events = vec![
            stored(1, None),
            stored(2, Some(1)),
            stored(3, Some(1)),
            KvEvent::Removed { hash: hash(8) },
            KvEvent::Removed { hash: hash(u64::MAX) },
            stored(4, Some(3)),
            KvEvent::Cleared,
        ];
        let messages = KvEventWriter::new(4).messages(batch(6, false, events));
        let [message] = &messages[..] else { panic!("{messages:?}") };
        assert_eq!((message.sequence_number, message.snapshot), (7, None));
        let told: Vec<(u64, Vec<i64>, Option<i64>)> = message
            .events
            .iter()
            .map(|event| match event.data.as_ref().unwrap() {
                Data::Stored(run) => (
                    event.event_id,
                    run.blocks.iter().map(|block| block.block_hash).collect(),
                    run.parent_block_hash,
                ),
                Data::Removed(removed) => (event.event_id, removed.block_hashes.clone(), None),
                Data::Cleared(_) => (event.event_id, Vec::new(), None),
            })
            .collect();
        let expected = [
            (1, vec![1, 2], None),
            (2, vec![3], Some(1)),
            (3, vec![8, -1], None),
            (4, vec![4], Some(3)),
            (5, Vec::new(), None),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_snapshot_begins_with_nothing_and_its_numbers_lead_to_the_changes() {
        for (blocks, sequence, chunks) in [(0, 0, 1), (3, 0, 1), (100_000, 1 << 20, 5), (100_000, 2, 3)] {
            let all =
                (1..=blocks).map(|number| stored(number, number.checked_sub(2).map(|n| n + 1))).collect();
            let mut writer = KvEventWriter::new(4);
            let messages = writer.messages(batch(sequence, true, all));
            assert_eq!(messages.len(), chunks, "{blocks} blocks after {sequence} batches");
            let numbers: Vec<u64> = messages.iter().map(|message| message.sequence_number).collect();
            let first = sequence + 2 - chunks as u64;
            assert_eq!(numbers, (first..=sequence + 1).collect::<Vec<_>>());
            assert!(numbers[0] >= 1);
            let mut hashes = Vec::new();
            for (index, message) in messages.iter().enumerate() {
                let snapshot = message.snapshot.unwrap();
                assert_eq!((snapshot.index, snapshot.count), (index as u32, chunks as u32));
                assert_eq!(snapshot.blocks, blocks);
                for (place, event) in message.events.iter().enumerate() {
                    match event.data.as_ref().unwrap() {
                        Data::Cleared(_) => assert_eq!((index, place), (0, 0)),
                        Data::Stored(run) => hashes.extend(run.blocks.iter().map(|block| block.block_hash)),
                        Data::Removed(_) => panic!("a snapshot removes nothing"),
                    }
                }
            }
            assert_eq!(hashes, (1..=blocks as i64).collect::<Vec<_>>());
            let next = writer.messages(batch(sequence + 1, false, vec![KvEvent::Cleared]));
            assert_eq!(next[0].sequence_number, sequence + 2, "no gap, nothing twice");
        }
    }
}
