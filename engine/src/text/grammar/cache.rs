//! What was compiled, kept for requests that ask the same.

use std::{fmt, hash::Hash, sync::Arc};

use lru::LruCache;
use parking_lot::Mutex;

/// Entries at most, and bytes of what they were compiled from. What came of it may be a hundred times as large.
const MAX_ENTRIES: usize = 64;
const MAX_BYTES: usize = 1 << 20;

/// What came of it, once somebody has it; whoever makes it holds the lock.
type Slot<V> = Arc<Mutex<Option<Result<Arc<V>, String>>>>;

/// Values by what they were made from, least recently used first to go. Failures are kept as well, so that what takes long to be refused is refused
/// at once the next time.
pub(super) struct Cache<K: Hash + Eq, V> {
    kept: Mutex<Kept<K, V>>,
}

struct Kept<K: Hash + Eq, V> {
    slots: LruCache<K, (Slot<V>, usize)>,
    bytes: usize,
}

/// Why nothing was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It never will be.
    Final(String),
    /// Others are at it; another try may do better.
    Busy,
}

impl From<String> for Refusal {
    fn from(error: String) -> Self {
        Self::Final(error)
    }
}

impl<K: Hash + Eq, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self { kept: Mutex::new(Kept { slots: LruCache::unbounded(), bytes: 0 }) }
    }
}

impl<K: Hash + Eq + Clone, V> Cache<K, V> {
    /// The value of `key`, made from so many bytes. Of callers that ask for the same at the same time one makes it, and the others wait.
    pub(super) fn get_or_make(
        &self,
        key: &K,
        bytes: usize,
        make: impl FnOnce() -> Result<V, Refusal>,
    ) -> Result<Arc<V>, Refusal> {
        let slot = self.slot(key, bytes);
        let mut value = slot.lock();
        if let Some(made) = &*value {
            return made.clone().map_err(Refusal::Final);
        }
        let made = match make() {
            Ok(made) => Ok(Arc::new(made)),
            Err(Refusal::Final(error)) => Err(error),
            Err(Refusal::Busy) => return Err(Refusal::Busy),
        };
        *value = Some(made.clone());
        made.map_err(Refusal::Final)
    }

    fn slot(&self, key: &K, bytes: usize) -> Slot<V> {
        let Kept { slots, bytes: total } = &mut *self.kept.lock();
        if let Some((slot, _)) = slots.get(key) {
            return slot.clone();
        }
        let slot = Slot::default();
        slots.push(key.clone(), (slot.clone(), bytes));
        *total += bytes;
        while slots.len() > MAX_ENTRIES || (*total > MAX_BYTES && slots.len() > 1) {
            let Some((_, (_, bytes))) = slots.pop_lru() else { break };
            *total -= bytes;
        }
        slot
    }
}

impl<K: Hash + Eq, V> fmt::Debug for Cache<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = self.kept.lock();
        f.debug_struct("Cache").field("entries", &kept.slots.len()).field("bytes", &kept.bytes).finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{
        sync::{
            Barrier,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
        thread,
    };

    use super::*;

    fn get(cache: &Cache<usize, usize>, key: usize, bytes: usize, made: &AtomicUsize) -> usize {
        let make = || {
            made.fetch_add(1, Relaxed);
            Ok(key)
        };
        *cache.get_or_make(&key, bytes, make).unwrap()
    }

    #[test]
    fn what_was_used_least_recently_goes_first() {
        let (cache, made) = (Cache::default(), AtomicUsize::new(0));
        for key in 0..MAX_ENTRIES {
            get(&cache, key, 1, &made);
        }
        get(&cache, 0, 1, &made);
        get(&cache, MAX_ENTRIES, 1, &made);
        assert_eq!(made.load(Relaxed), MAX_ENTRIES + 1);
        get(&cache, 0, 1, &made);
        assert_eq!(made.load(Relaxed), MAX_ENTRIES + 1, "it was used in between");
        get(&cache, 1, 1, &made);
        assert_eq!(made.load(Relaxed), MAX_ENTRIES + 2);
    }

    #[test]
    fn large_sources_leave_room_for_few() {
        let (cache, made) = (Cache::default(), AtomicUsize::new(0));
        for key in [0, 1, 2, 1, 2] {
            get(&cache, key, MAX_BYTES / 2, &made);
        }
        assert_eq!(made.load(Relaxed), 3);
        get(&cache, 0, MAX_BYTES / 2, &made);
        assert_eq!(made.load(Relaxed), 4);
        assert_eq!(cache.kept.lock().bytes, MAX_BYTES);
    }

    #[test]
    fn it_is_made_once_for_many_that_ask_at_the_same_time() {
        let (cache, made) = (Cache::default(), AtomicUsize::new(0));
        let barrier = Barrier::new(4);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    barrier.wait();
                    assert_eq!(get(&cache, 7, 1, &made), 7);
                });
            }
        });
        assert_eq!(made.load(Relaxed), 1);
    }

    #[test]
    fn what_is_refused_for_now_is_tried_again_and_other_refusals_are_kept() {
        let cache = Cache::<usize, usize>::default();
        let wrong = Refusal::Final("wrong".into());
        assert_eq!(cache.get_or_make(&1, 1, || Err(Refusal::Busy)).unwrap_err(), Refusal::Busy);
        assert_eq!(cache.get_or_make(&1, 1, || Err(wrong.clone())).unwrap_err(), wrong);
        assert_eq!(cache.get_or_make(&1, 1, || Ok(1)).unwrap_err(), wrong);
    }
}
