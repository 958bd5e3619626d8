//! Places in the queue: bounds that are checked before a request reaches the engine thread.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;

use crate::{admission::retry_hint, error::RequestError};

/// The places, and how many are taken.
#[derive(Debug)]
pub(crate) struct Queue {
    max_requests: usize,
    max_tokens: Option<usize>,
    taken: Mutex<Taken>,
    /// Nanoseconds between two requests that leave, as the engine thread measures it; 0 while that is not known.
    interval: AtomicU64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Taken {
    requests: usize,
    /// Of their prompts.
    tokens: usize,
}

impl Queue {
    pub(crate) fn new(max_requests: usize, max_tokens: Option<usize>) -> Arc<Self> {
        Arc::new(Self { max_requests, max_tokens, taken: Mutex::default(), interval: AtomicU64::new(0) })
    }

    /// Takes a place for a prompt of so many tokens. A queue that is empty takes any.
    ///
    /// # Errors
    /// [`RequestError::QueueFull`] with the time until there will be room, by the present rate.
    pub(crate) fn take(self: &Arc<Self>, tokens: usize) -> Result<QueueSlot, RequestError> {
        let mut taken = self.taken.lock();
        let too_many = taken.tokens + tokens > self.max_tokens.unwrap_or(usize::MAX);
        if taken.requests > 0 && (taken.requests >= self.max_requests || too_many) {
            let retry_after = retry_hint(self.until_room(*taken, tokens));
            return Err(RequestError::QueueFull { waiting: taken.requests, retry_after });
        }
        taken.requests += 1;
        taken.tokens += tokens;
        Ok(QueueSlot { queue: self.clone(), tokens })
    }

    /// Tells the queue how quickly it moves.
    pub(crate) fn publish_interval(&self, interval: Option<Duration>) {
        let nanos =
            interval.map_or(0, |interval| u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX).max(1));
        self.interval.store(nanos, Relaxed);
    }

    /// Enough must leave for one more request, and for its tokens.
    fn until_room(&self, taken: Taken, tokens: usize) -> Option<Duration> {
        let interval = match self.interval.load(Relaxed) {
            0 => return None,
            nanos => Duration::from_nanos(nanos),
        };
        let requests = (taken.requests + 1).saturating_sub(self.max_requests);
        let excess = (taken.tokens + tokens).saturating_sub(self.max_tokens.unwrap_or(usize::MAX));
        let by_tokens = excess.div_ceil((taken.tokens / taken.requests).max(1)).min(taken.requests);
        let leave = u32::try_from(requests.max(by_tokens)).unwrap_or(u32::MAX);
        Some(interval.saturating_mul(leave))
    }
}

/// A request's place in the queue; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct QueueSlot {
    queue: Arc<Queue>,
    tokens: usize,
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        let mut taken = self.queue.taken.lock();
        taken.requests -= 1;
        taken.tokens -= self.tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(queue: &Arc<Queue>, tokens: usize) -> (usize, Duration) {
        match queue.take(tokens) {
            Err(RequestError::QueueFull { waiting, retry_after }) => (waiting, retry_after),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn both_bounds_hold_and_come_back_with_the_slots() {
        let queue = Queue::new(3, Some(100));
        let big = queue.take(1000).unwrap();
        assert_eq!(refused(&queue, 1).0, 1, "an empty queue took more than the bound, and now it is full");
        drop(big);
        let slots = [queue.take(50).unwrap(), queue.take(50).unwrap()];
        assert_eq!(refused(&queue, 1).0, 2);
        let empty = queue.take(0).unwrap();
        assert_eq!(refused(&queue, 0).0, 3);
        drop((slots, empty));
        assert_eq!(*queue.taken.lock(), Taken::default());
    }

    #[test]
    fn the_hint_is_the_time_until_enough_have_left() {
        let queue = Queue::new(4, Some(100));
        let _slots: Vec<_> = (0..4).map(|_| queue.take(25).unwrap()).collect();
        assert_eq!(refused(&queue, 10).1, Duration::from_secs(1), "the rate is not known yet");
        queue.publish_interval(Some(Duration::from_millis(200)));
        assert_eq!(refused(&queue, 10).1, Duration::from_millis(200));
        assert_eq!(
            refused(&queue, 60).1,
            Duration::from_millis(600),
            "60 tokens are three of those that wait"
        );
        assert_eq!(refused(&queue, 5000).1, Duration::from_millis(800), "once all have left it is taken");
    }
}
