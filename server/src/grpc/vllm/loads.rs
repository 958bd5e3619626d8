//! Rates from counters that somebody reads now and then.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tidemill_engine::Counters;

use crate::convert::vllm::Rates;

/// Readings are compared with one that is about this old, or with the last one before where nobody asked for longer.
const WINDOW: Duration = Duration::from_secs(2);
/// Closer readings are not kept, however many ask.
const SPACING: Duration = Duration::from_millis(100);

/// Remembers readings of the engine's counters.
#[derive(Debug, Default)]
pub struct LoadMeter(Mutex<VecDeque<Reading>>);

#[derive(Debug, Clone, Copy)]
struct Reading {
    at: Instant,
    generated: u64,
    queries: u64,
    hits: u64,
}

impl LoadMeter {
    /// What happened between an earlier reading and this one; nothing is known at the first.
    pub fn rates(&self, now: Instant, counters: &Counters) -> Rates {
        let reading = Reading {
            at: now,
            generated: counters.generation_tokens,
            queries: counters.prefix_cache_queries,
            hits: counters.prefix_cache_hits,
        };
        // What a panic elsewhere could leave behind is still a list of readings.
        let mut readings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let old = |reading: &Reading| now.duration_since(reading.at) >= WINDOW;
        while readings.get(1).is_some_and(old) {
            readings.pop_front();
        }
        let rates = readings.front().map_or_else(Rates::default, |earlier| reading.since(earlier));
        if readings.back().is_none_or(|last| now.duration_since(last.at) >= SPACING) {
            readings.push_back(reading);
        }
        rates
    }
}

impl Reading {
    fn since(&self, earlier: &Self) -> Rates {
        // Of two that ask at once, the one that read first may come here second.
        let seconds = self.at.duration_since(earlier.at).as_secs_f64();
        let share = |part: u64, of: f64| if of > 0.0 { part as f64 / of } else { 0.0 };
        Rates {
            generated: share(self.generated.saturating_sub(earlier.generated), seconds),
            cache_hits: share(
                self.hits.saturating_sub(earlier.hits),
                self.queries.saturating_sub(earlier.queries) as f64,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_late_however_often_somebody_asks() {
        let (meter, start) = (LoadMeter::default(), Instant::now());
        let at = |ms: u64, tokens: u64, hits: u64| {
            let counters = Counters {
                generation_tokens: tokens,
                prefix_cache_queries: 2 * hits,
                prefix_cache_hits: hits,
                ..Counters::default()
            };
            meter.rates(start + Duration::from_millis(ms), &counters)
        };
        assert_eq!(at(0, 1000, 0), Rates::default(), "nothing to compare with");
        assert_eq!(at(0, 1000, 0), Rates::default(), "no time has passed");
        assert_eq!(at(500, 1050, 10), Rates { generated: 100.0, cache_hits: 0.5 });
        for ms in 501..3000 {
            at(ms, 1050, 10);
        }
        assert_eq!(at(3000, 1050, 10), Rates::default(), "what is long ago does not count");
        assert_eq!(at(13_000, 2050, 10).generated, 100.0, "nobody asked for 10 s");
        assert!(meter.0.lock().unwrap().len() < 64);
    }
}
