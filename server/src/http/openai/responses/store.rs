//! Responses that clients can come back to.
//!
//! They are kept in this process's memory: a restart forgets them, and another replica does not know them. What is kept is bounded in
//! number, bytes and time; the response that nobody asked for the longest goes first. Each belongs to the credential that made it: for
//! others it does not exist.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use lru::LruCache;
use parking_lot::Mutex;
use serde_json::Value;
use tokio_util::sync::DropGuard;

use super::draft::Draft;

/// What is kept at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Responses.
    pub entries: usize,
    /// Bytes of their JSON in memory, about.
    pub bytes: usize,
    /// Since a response was made.
    pub age: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 4096, bytes: 256 << 20, age: Duration::from_secs(24 * 60 * 60) }
    }
}

/// Rest between two looks for what has grown too old.
const SWEEP: Duration = Duration::from_secs(60);
/// What a JSON value takes beside its text, about.
const VALUE_BYTES: usize = 48;

/// Names a response: who made it, and its id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// The fingerprint of its maker's key.
    pub credential: Arc<str>,
    /// `resp_…`.
    pub id: String,
}

/// What a response answered.
#[derive(Debug, Clone, Default)]
pub struct Context {
    /// All items, of the responses before it too.
    pub items: Vec<Arc<Value>>,
    /// Where its own begin.
    pub own: usize,
}

/// How a stored response stands.
pub enum State {
    /// It is being made in the background. Dropping the guard ends that.
    Running(Arc<Mutex<Draft>>, DropGuard),
    /// It is over.
    Done(Arc<Value>),
}

struct Entry {
    context: Context,
    state: State,
    bytes: usize,
    made: Instant,
}

/// The responses that clients can come back to.
pub struct Store {
    limits: Limits,
    kept: Mutex<Kept>,
}

struct Kept {
    entries: LruCache<Key, Entry>,
    bytes: usize,
    swept: Instant,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} responses", self.kept.lock().entries.len())
    }
}

impl Default for Store {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

/// A response that was cancelled just now: what stands, and what ends its making when it is dropped.
pub type Cancelled = (Arc<Value>, Option<DropGuard>);

impl Store {
    /// A store that keeps so much.
    pub fn new(limits: Limits) -> Self {
        let kept = Kept { entries: LruCache::unbounded(), bytes: 0, swept: Instant::now() };
        Self { limits, kept: Mutex::new(kept) }
    }

    /// Keeps a response.
    pub fn insert(&self, key: Key, context: Context, state: State) {
        let bytes = context.bytes() + state.bytes();
        let mut kept = self.kept.lock();
        kept.remove(&key);
        kept.bytes += bytes;
        kept.entries.put(key, Entry { context, state, bytes, made: Instant::now() });
        kept.shrink(&self.limits);
    }

    /// The response as it stands.
    pub fn response(&self, key: &Key) -> Option<Arc<Value>> {
        self.look(key, |entry| entry.state.response())
    }

    /// The items that it was given itself.
    pub fn own_items(&self, key: &Key) -> Option<Vec<Arc<Value>>> {
        self.look(key, |entry| entry.context.items[entry.context.own..].to_vec())
    }

    /// All items that the next response goes on from, with this one's output. The inner `None` is for one that is not over.
    pub fn conversation(&self, key: &Key) -> Option<Option<Vec<Arc<Value>>>> {
        self.look(key, |entry| {
            let State::Done(response) = &entry.state else { return None };
            let output = response["output"].as_array().into_iter().flatten();
            let mut items = entry.context.items.clone();
            items.extend(output.cloned().map(Arc::new));
            Some(items)
        })
    }

    /// Notes that a response in the background is over.
    pub fn finish(&self, key: &Key) {
        self.settle(key, |_| ());
    }

    /// Ends a response in the background; one that is over stays as it is.
    pub fn cancel(&self, key: &Key) -> Option<Cancelled> {
        let guard = self.settle(key, Draft::cancel);
        Some((self.response(key)?, guard))
    }

    /// Forgets a response. One that is being made ends. False when there was none.
    pub fn remove(&self, key: &Key) -> bool {
        self.look(key, |_| ()).is_some() && self.kept.lock().remove(key)
    }

    /// Turns a draft into what it has become.
    fn settle(&self, key: &Key, last: impl FnOnce(&mut Draft)) -> Option<DropGuard> {
        let mut kept = self.kept.lock();
        let kept = &mut *kept;
        let entry = kept.entries.peek_mut(key)?;
        let State::Running(draft, _) = &entry.state else { return None };
        let response = {
            let mut draft = draft.lock();
            last(&mut draft);
            Arc::new(draft.json())
        };
        let was = std::mem::replace(&mut entry.state, State::Done(response));
        let bytes = entry.context.bytes() + entry.state.bytes();
        kept.bytes = kept.bytes - entry.bytes + bytes;
        entry.bytes = bytes;
        kept.shrink(&self.limits);
        match was {
            State::Running(_, guard) => Some(guard),
            State::Done(_) => None,
        }
    }

    fn look<T>(&self, key: &Key, look: impl FnOnce(&Entry) -> T) -> Option<T> {
        let mut kept = self.kept.lock();
        if kept.entries.peek(key)?.made.elapsed() >= self.limits.age {
            kept.remove(key);
            return None;
        }
        kept.entries.get(key).map(look)
    }
}

impl Kept {
    fn remove(&mut self, key: &Key) -> bool {
        let entry = self.entries.pop(key);
        entry.inspect(|entry| self.bytes -= entry.bytes).is_some()
    }

    /// Lets go of what is too old, and then of what was not asked for the longest until the rest is within the limits.
    fn shrink(&mut self, limits: &Limits) {
        if self.swept.elapsed() >= SWEEP {
            self.swept = Instant::now();
            let old = self.entries.iter().filter(|(_, entry)| entry.made.elapsed() >= limits.age);
            let old: Vec<Key> = old.map(|(key, _)| key.clone()).collect();
            for key in &old {
                self.remove(key);
            }
        }
        while self.entries.len() > limits.entries || self.bytes > limits.bytes {
            let Some((_, entry)) = self.entries.pop_lru() else { break };
            self.bytes -= entry.bytes;
        }
    }
}

impl State {
    fn response(&self) -> Arc<Value> {
        match self {
            Self::Running(draft, _) => Arc::new(draft.lock().json()),
            Self::Done(response) => response.clone(),
        }
    }

    /// What is still being written counts when it is over.
    fn bytes(&self) -> usize {
        match self {
            Self::Running(draft, _) => draft.lock().echo.values().map(bytes).sum(),
            Self::Done(response) => bytes(response),
        }
    }
}

impl Context {
    fn bytes(&self) -> usize {
        self.items.iter().map(|item| bytes(item)).sum()
    }
}

/// The memory of a JSON value, about.
fn bytes(value: &Value) -> usize {
    VALUE_BYTES
        + match value {
            Value::String(text) => text.len(),
            Value::Array(list) => list.iter().map(bytes).sum(),
            Value::Object(map) => map.iter().map(|(key, value)| VALUE_BYTES + key.len() + bytes(value)).sum(),
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn key(credential: &str, id: &str) -> Key {
        Key { credential: credential.into(), id: id.into() }
    }

    fn put(store: &Store, id: &str, text: &str) {
        let items = vec![Arc::new(json!({"text": text}))];
        let response = Arc::new(json!({"id": id, "output": [{"type": "message"}]}));
        store.insert(key("a", id), Context { items, own: 0 }, State::Done(response));
    }

    fn store(entries: usize, bytes: usize) -> Store {
        Store::new(Limits { entries, bytes, ..Limits::default() })
    }

    #[test]
    fn a_response_exists_for_its_maker_alone() {
        let store = Store::default();
        put(&store, "r", "x");
        assert_eq!(store.response(&key("a", "r")).unwrap()["id"], "r");
        let stranger = key("b", "r");
        assert!(store.response(&stranger).is_none() && store.own_items(&stranger).is_none());
        assert!(store.conversation(&stranger).is_none() && store.cancel(&stranger).is_none());
        assert!(!store.remove(&stranger) && store.remove(&key("a", "r")) && !store.remove(&key("a", "r")));
        assert_eq!(store.kept.lock().bytes, 0);
    }

    #[test]
    fn the_one_that_nobody_asked_for_goes_first() {
        let store = store(2, usize::MAX);
        put(&store, "1", "");
        put(&store, "2", "");
        assert!(store.response(&key("a", "1")).is_some());
        put(&store, "3", "");
        let there = ["1", "2", "3"].map(|id| store.response(&key("a", id)).is_some());
        assert_eq!(there, [true, false, true]);
    }

    #[test]
    fn bytes_are_bounded_and_given_back() {
        let store = store(usize::MAX, 10_000);
        for round in 0..100 {
            put(&store, &round.to_string(), &"x".repeat(1000));
            let kept = store.kept.lock();
            assert!(kept.bytes <= 10_000 && !kept.entries.is_empty());
            assert_eq!(kept.bytes, kept.entries.iter().map(|(_, entry)| entry.bytes).sum::<usize>());
        }
        put(&store, "giant", &"x".repeat(20_000));
        assert_eq!(store.kept.lock().bytes, 0, "what can never fit is not kept");
    }

    #[test]
    fn what_is_old_is_gone() {
        let store = Store::new(Limits { age: Duration::ZERO, ..Limits::default() });
        put(&store, "r", "");
        assert!(store.response(&key("a", "r")).is_none());
        assert_eq!(store.kept.lock().bytes, 0);
    }

    #[test]
    fn a_conversation_goes_on_behind_the_output() {
        let store = Store::default();
        put(&store, "r", "x");
        let items = store.conversation(&key("a", "r")).unwrap().unwrap();
        assert_eq!(
            items.iter().map(|item| &**item).collect::<Vec<_>>(),
            [&json!({"text": "x"}), &json!({"type": "message"})]
        );
    }
}
