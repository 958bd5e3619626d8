//! What a stream's reader has not taken yet: the bound on memory that a slow client can hold.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// Tokens on their way from the engine thread to one stream's reader, and whether the engine waits for the reader.
///
/// The engine thread raises the flag when too many are unread, and parks the request; the reader lowers it when half of
/// them are taken, and says so. Each side first writes what the other one reads and then reads what the other one writes, in the one order of
/// `SeqCst`, so at least one of them sees that the stream is drained and the flag up; and lowering it is a swap, so exactly one acts on it.
#[derive(Debug)]
pub(crate) struct Unread {
    max: usize,
    tokens: AtomicUsize,
    waits: AtomicBool,
}

impl Unread {
    /// Nothing is unread; `max` is at least 1.
    pub(crate) fn new(max: usize) -> Self {
        Self { max, tokens: AtomicUsize::new(0), waits: AtomicBool::new(false) }
    }

    /// The engine sends a token. True when its request is to be parked: the reader will say when it goes on.
    pub(crate) fn sent(&self) -> bool {
        let unread = self.tokens.fetch_add(1, SeqCst) + 1;
        if unread < self.max || self.waits.load(SeqCst) {
            return false;
        }
        self.waits.store(true, SeqCst);
        // The reader may have taken everything before it could see the flag.
        !self.lower_if_drained()
    }

    /// The reader takes a token. True when the engine waits and is to be told that it can go on.
    pub(crate) fn taken(&self) -> bool {
        self.tokens.fetch_sub(1, SeqCst);
        self.lower_if_drained()
    }

    /// Whether the reader owes word. Of a request that was parked again meanwhile an old word is to be ignored.
    pub(crate) fn waits(&self) -> bool {
        self.waits.load(SeqCst)
    }

    fn lower_if_drained(&self) -> bool {
        self.tokens.load(SeqCst) <= self.max / 2 && self.waits.load(SeqCst) && self.waits.swap(false, SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    #[test]
    fn the_engine_waits_from_the_bound_until_half_is_taken() {
        let unread = Unread::new(4);
        assert_eq!([(); 4].map(|()| unread.sent()), [false, false, false, true]);
        assert!(!unread.sent(), "a token that was in flight parks nobody twice");
        assert!(unread.waits());
        assert_eq!([(); 5].map(|()| unread.taken()), [false, false, true, false, false]);
        assert!(!unread.waits());
    }

    #[test]
    fn no_wake_up_is_lost_between_two_threads() {
        for max in [1, 2, 3, 8] {
            let unread = Unread::new(max);
            let (tokens_tx, tokens) = mpsc::channel();
            let (word_tx, word) = mpsc::channel();
            thread::scope(|scope| {
                let unread = &unread;
                scope.spawn(move || {
                    let mut most = 0;
                    for _ in 0..20_000 {
                        let park = unread.sent();
                        most = most.max(unread.tokens.load(SeqCst));
                        tokens_tx.send(()).unwrap();
                        if park {
                            // Hangs here when a wake-up is lost.
                            word.recv().unwrap();
                        }
                    }
                    assert!(most <= max, "{most} unread, {max} allowed");
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
            assert!(!unread.waits() && unread.tokens.load(SeqCst) == 0);
        }
    }
}
