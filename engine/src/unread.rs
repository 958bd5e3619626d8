//! What a stream's reader has not taken yet: the bound on memory that a slow client can hold.

use std::sync::atomic::Ordering::SeqCst;

use crate::sync::AtomicUsize;

/// Tokens on their way from the engine thread to one stream's reader, and whether the engine waits for the reader.
///
/// The engine thread raises the flag when too many are unread, and parks the request; the reader lowers it when half of
/// them are taken, and says so. Count and flag are one word and change together, so neither side acts on a count that is not true any more:
/// no word is lost, none is said twice, and none before its time.
#[derive(Debug)]
pub(crate) struct Unread {
    max: usize,
    /// Unread tokens times [`TOKEN`], and [`WAITS`].
    state: AtomicUsize,
}

/// The engine waits for the reader.
const WAITS: usize = 1;
/// One token.
const TOKEN: usize = 2;

impl Unread {
    /// Nothing is unread; `max` is at least 1.
    pub(crate) fn new(max: usize) -> Self {
        Self { max, state: AtomicUsize::new(0) }
    }

    /// The engine sends a token. True when its request is to be parked: the reader will say when it goes on.
    pub(crate) fn sent(&self) -> bool {
        self.flag_changes(|state| {
            let state = state + TOKEN;
            if state / TOKEN >= self.max { state | WAITS } else { state }
        })
    }

    /// The reader takes a token. True when the engine waits and is to be told that it can go on.
    pub(crate) fn taken(&self) -> bool {
        self.flag_changes(|state| {
            let state = state - TOKEN;
            if state / TOKEN <= self.max / 2 { state & !WAITS } else { state }
        })
    }

    /// Tokens that are unread.
    pub(crate) fn tokens(&self) -> usize {
        self.state.load(SeqCst) / TOKEN
    }

    /// Whether the reader owes word. Of a request that was parked again meanwhile an old word is to be ignored.
    pub(crate) fn waits(&self) -> bool {
        self.state.load(SeqCst) & WAITS != 0
    }

    fn flag_changes(&self, change: impl Fn(usize) -> usize) -> bool {
        let before = self.state.fetch_update(SeqCst, SeqCst, |state| Some(change(state)));
        before.is_ok_and(|before| (before ^ change(before)) & WAITS != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::{ROUNDS, interleave, mpsc, thread};

    #[test]
    fn the_engine_waits_from_the_bound_until_half_is_taken() {
        interleave(|| {
            let unread = Unread::new(4);
            assert_eq!([(); 4].map(|()| unread.sent()), [false, false, false, true]);
            assert!(!unread.sent(), "a token that was in flight parks nobody twice");
            assert!(unread.waits());
            assert_eq!([(); 5].map(|()| unread.taken()), [false, false, true, false, false]);
            assert!(!unread.waits());
        });
    }

    /// Sends tokens from one thread to another, and waits whenever it is told to.
    fn send_and_take(max: usize) {
        let unread = Unread::new(max);
        let (tokens_tx, tokens) = mpsc::channel();
        let (word_tx, word) = mpsc::channel();
        thread::scope(|scope| {
            let unread = &unread;
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    let park = unread.sent();
                    let held = unread.state.load(SeqCst) / TOKEN;
                    assert!(held <= max, "{held} unread, {max} allowed");
                    tokens_tx.send(()).unwrap();
                    if park {
                        // Hangs here when a wake-up is lost.
                        word.recv().unwrap();
                        assert!(!unread.waits(), "word came before its time");
                    }
                }
                assert!(word.try_recv().is_err(), "word came twice");
            });
            scope.spawn(move || {
                for () in tokens {
                    if unread.taken() {
                        // The engine may have ended.
                        let _ = word_tx.send(());
                    }
                }
            });
        });
        assert_eq!(unread.state.load(SeqCst), 0);
    }

    #[test]
    fn no_wake_up_is_lost_between_two_threads() {
        for max in [1, 2, 3, 8] {
            interleave(move || send_and_take(max));
        }
    }
}
