//! What happened to a request, in bounded memory.

use std::{collections::VecDeque, time::Instant};

use crate::explain::{Life, LifeEvent};

/// Events that are kept from the beginning of a life.
const FIRST: usize = 16;
/// Events that are kept from its end.
const LAST: usize = 48;

/// The events of a request so far. Steps that decode are none, so a quiet life is short; of a long one the middle is left out.
#[derive(Debug)]
pub(crate) struct LifeLog {
    submitted: Instant,
    first: Vec<LifeEvent>,
    last: VecDeque<LifeEvent>,
    left_out: usize,
}

impl LifeLog {
    /// The life of a request that enters the queue `now`.
    pub(crate) fn new(submitted: Instant, now: Instant) -> Self {
        let mut log = Self { submitted, first: Vec::new(), last: VecDeque::new(), left_out: 0 };
        log.push(0, Life::Queued, now);
        log
    }

    pub(crate) fn submitted(&self) -> Instant {
        self.submitted
    }

    /// Takes note of what happened to a completion.
    pub(crate) fn push(&mut self, index: usize, what: Life, now: Instant) {
        let event =
            LifeEvent { at: now.saturating_duration_since(self.submitted), index: index as u32, what };
        if self.first.len() < FIRST {
            return self.first.push(event);
        }
        if self.last.len() == LAST {
            self.last.pop_front();
            self.left_out += 1;
        }
        self.last.push_back(event);
    }

    /// What is kept, oldest first, and how many events are not.
    pub(crate) fn events(&self) -> (Vec<LifeEvent>, usize) {
        (self.first.iter().chain(&self.last).copied().collect(), self.left_out)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn of_a_long_life_both_ends_are_kept_and_the_middle_is_counted() {
        let start = Instant::now();
        let mut log = LifeLog::new(start, start);
        for n in 1..1000 {
            log.push(1, Life::Chunk { tokens: 1, computed: n }, start + Duration::from_millis(n as u64));
        }
        let (events, left_out) = log.events();
        assert_eq!((events.len(), left_out), (FIRST + LAST, 1000 - FIRST - LAST));
        let at: Vec<u128> = events.iter().map(|event| event.at.as_millis()).collect();
        let expected: Vec<u128> = (0..FIRST as u128).chain(1000 - LAST as u128..1000).collect();
        assert_eq!(at, expected);
        assert_eq!((events[0].index, events[0].what), (0, Life::Queued));
    }
}
