//! Changes of the prefix cache, for the wire.

use tidemill_engine::kv::{KvEvent, KvEventBatch};
use tidemill_proto::v1::{self, kv_event};

/// Estimated size at which a message is full. Clients take 4 MiB by default, and a snapshot of a large cache has more.
const MESSAGE_BYTES: usize = 1 << 20;
/// What an event takes without its token ids: two hashes and their tags.
const EVENT_BYTES: usize = 80;
/// What a token id takes at most.
const TOKEN_BYTES: usize = 5;

/// A batch as messages: one, or more for a large one.
pub fn kv_event_messages(batch: KvEventBatch, include_token_ids: bool) -> Vec<v1::WatchKvEventsResponse> {
    let message = |continues: bool, events: Vec<v1::KvEvent>| v1::WatchKvEventsResponse {
        sequence: batch.sequence,
        is_snapshot: batch.is_snapshot,
        continues,
        events,
    };
    let (mut messages, mut events, mut bytes) = (Vec::new(), Vec::new(), 0);
    for event in batch.events {
        let event = kv_event(event, include_token_ids);
        let size = match &event.event {
            Some(kv_event::Event::Stored(stored)) => EVENT_BYTES + TOKEN_BYTES * stored.token_ids.len(),
            _ => EVENT_BYTES,
        };
        if bytes + size > MESSAGE_BYTES && !events.is_empty() {
            messages.push(message(true, std::mem::take(&mut events)));
            bytes = 0;
        }
        bytes += size;
        events.push(event);
    }
    messages.push(message(false, events));
    messages
}

fn kv_event(event: KvEvent, include_token_ids: bool) -> v1::KvEvent {
    use kv_event::{Cleared, Event, Removed, Stored};
    let event = match event {
        KvEvent::Stored { hash, parent, tokens } => Event::Stored(Stored {
            hash: hash.0.to_vec(),
            parent_hash: parent.map_or_else(Vec::new, |parent| parent.0.to_vec()),
            token_ids: if include_token_ids { tokens.iter().map(|id| id.0).collect() } else { Vec::new() },
        }),
        KvEvent::Removed { hash } => Event::Removed(Removed { hash: hash.0.to_vec() }),
        KvEvent::Cleared => Event::Cleared(Cleared {}),
    };
    v1::KvEvent { event: Some(event) }
}

#[cfg(test)]
mod tests {
    use tidemill_engine::{ids::TokenId, kv::BlockHash};

    use super::*;

    fn stored(number: usize) -> KvEvent {
        let hash = |number: usize| BlockHash([number as u8; 32]);
        let parent = number.checked_sub(1).map(hash);
        KvEvent::Stored { hash: hash(number), parent, tokens: vec![TokenId(number as u32); 256] }
    }

    fn batch(events: Vec<KvEvent>) -> KvEventBatch {
        KvEventBatch { sequence: 7, is_snapshot: true, events }
    }

    #[test]
    fn token_ids_are_told_to_those_alone_who_ask() {
        for ask in [false, true] {
            let [message] = &kv_event_messages(batch(vec![stored(0), stored(1)]), ask)[..] else { panic!() };
            for (number, event) in message.events.iter().enumerate() {
                let Some(kv_event::Event::Stored(stored)) = &event.event else { panic!("{event:?}") };
                assert_eq!(stored.token_ids.len(), if ask { 256 } else { 0 });
                assert_eq!(stored.hash, vec![number as u8; 32]);
                assert_eq!(stored.parent_hash.len(), 32 * number, "the first has no parent");
            }
        }
    }

    #[test]
    fn a_large_batch_becomes_messages_that_clients_take_and_an_empty_one_is_still_told() {
        use prost::Message;
        let messages = kv_event_messages(batch((0..10_000).map(stored).collect()), true);
        assert!(messages.len() > 3, "{}", messages.len());
        let count: usize = messages.iter().map(|message| message.events.len()).sum();
        assert_eq!(count, 10_000);
        let last = messages.len() - 1;
        for (number, message) in messages.iter().enumerate() {
            assert!(message.encoded_len() < 2 << 20);
            assert_eq!((message.sequence, message.is_snapshot, message.continues), (7, true, number < last));
        }
        assert_eq!(kv_event_messages(batch(Vec::new()), true).len(), 1);
    }
}
