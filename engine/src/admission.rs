//! Whether a request is let into the queue: what it would wait, and whether that leaves it the time to be served.
//!
//! The prediction is Little's law read backwards: so many requests ahead, times the interval between two that leave the queue. The interval is
//! measured only while somebody waits, so an idle hour says nothing. Whoever has nobody ahead is never refused by a prediction:
//! so there is always somebody from whom a rate that has changed can be learnt.

use std::time::{Duration, Instant};

use crate::error::RequestError;

/// Weight of one new interval: the last eight make up two thirds.
const WEIGHT: f64 = 1.0 / 8.0;
/// Where nothing better is known.
const FALLBACK: Duration = Duration::from_secs(1);
/// What a hint may be: less makes clients hammer, more makes them give up.
const HINTS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(60));

/// A sensible time to wait before the next try, from a prediction.
pub(crate) fn retry_hint(predicted: Option<Duration>) -> Duration {
    predicted.unwrap_or(FALLBACK).clamp(HINTS.0, HINTS.1)
}

/// A request at the door.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    /// Sequences that will be served before it.
    pub ahead: usize,
    /// What serving it takes at least once its turn has come.
    pub service: Duration,
    pub deadline: Option<Instant>,
}

/// Measures the queue and judges who may join it.
#[derive(Debug)]
pub(crate) struct Admission {
    max_queue_time: Option<Duration>,
    /// Seconds between two first admissions while others wait, smoothed.
    interval: Option<f64>,
    /// The last first admission that left others waiting, or when they began to wait.
    since: Option<Instant>,
}

impl Admission {
    pub(crate) fn new(max_queue_time: Option<Duration>) -> Self {
        Self { max_queue_time, interval: None, since: None }
    }

    /// What a request may wait in the queue.
    pub(crate) fn max_queue_time(&self) -> Option<Duration> {
        self.max_queue_time
    }

    /// Takes note of a step that was planned: so many sequences left the queue for the first time, and so many wait on.
    pub(crate) fn planned(&mut self, admitted: usize, waiting: usize, now: Instant) {
        if let Some(since) = self.since
            && admitted > 0
        {
            let sample = now.duration_since(since).as_secs_f64() / admitted as f64;
            // So many equal samples in one.
            let weight = 1.0 - (1.0 - WEIGHT).powi(i32::try_from(admitted).unwrap_or(i32::MAX));
            self.interval = Some(self.interval.map_or(sample, |old| old + weight * (sample - old)));
        }
        self.since = match self.since {
            _ if waiting == 0 => None,
            Some(since) if admitted == 0 => Some(since),
            _ => Some(now),
        };
    }

    /// Between two that leave the queue, once that has been seen.
    pub(crate) fn interval(&self) -> Option<Duration> {
        self.interval.map(Duration::from_secs_f64)
    }

    /// What a request with so many ahead of it will wait; `None` while the rate is not known. A queue that has not moved for longer than usual is
    /// slower than it was.
    pub(crate) fn predict(&self, ahead: usize, now: Instant) -> Option<Duration> {
        let standing = self.since.map_or(0.0, |since| now.duration_since(since).as_secs_f64());
        Duration::try_from_secs_f64(self.interval?.max(standing) * ahead as f64).ok()
    }

    /// Whether a request is to be let in.
    ///
    /// # Errors
    /// [`RequestError::Overloaded`] when it would wait longer than it may, or longer than its deadline leaves it after the time that serving it
    /// takes. Without anybody ahead there is no wait, and so no refusal.
    pub(crate) fn judge(&self, arrival: Arrival, now: Instant) -> Result<(), RequestError> {
        let Some(wait) = self.predict(arrival.ahead, now).filter(|wait| !wait.is_zero()) else {
            return Ok(());
        };
        let left =
            arrival.deadline.map(|at| at.saturating_duration_since(now).saturating_sub(arrival.service));
        match self.max_queue_time.into_iter().chain(left).min() {
            Some(limit) if wait > limit => {
                // By then the queue is as short as it must be.
                let retry_after = retry_hint(Some(wait - limit));
                Err(RequestError::Overloaded { wait, limit, retry_after })
            }
            _ => Ok(()),
        }
    }

    /// What a request hears that has waited too long, while so many others wait: it may try again when they would not wait too long.
    pub(crate) fn waited_too_long(&self, wait: Duration, waiting: usize, now: Instant) -> RequestError {
        let limit = self.max_queue_time.unwrap_or(wait);
        let excess = self.predict(waiting, now).map(|predicted| predicted.saturating_sub(limit));
        RequestError::Overloaded { wait, limit, retry_after: retry_hint(excess.max(self.interval())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A queue from which one request leaves per 100 ms.
    fn steady(max_queue_time: Option<Duration>) -> (Admission, Instant) {
        let mut admission = Admission::new(max_queue_time);
        let mut now = Instant::now();
        admission.planned(1, 20, now);
        for _ in 0..40 {
            now += 100 * MS;
            admission.planned(1, 20, now);
        }
        (admission, now)
    }

    fn arrival(ahead: usize) -> Arrival {
        Arrival { ahead, service: Duration::ZERO, deadline: None }
    }

    #[test]
    fn the_wait_is_those_ahead_times_the_interval() {
        let (admission, now) = steady(None);
        assert_eq!(admission.predict(0, now), Some(Duration::ZERO));
        let wait = admission.predict(7, now).unwrap();
        assert!(wait.abs_diff(700 * MS) < MS, "{wait:?}");
        let stalled = admission.predict(7, now + 300 * MS).unwrap();
        assert!(stalled.abs_diff(2100 * MS) < MS, "nobody has left for 300 ms: {stalled:?}");
    }

    #[test]
    fn several_at_once_count_as_several_and_idle_time_as_nothing() {
        let mut admission = Admission::new(None);
        let start = Instant::now();
        admission.planned(5, 0, start);
        assert_eq!(admission.predict(3, start), None, "nobody has waited yet");
        admission.planned(0, 8, start + 3_600_000 * MS);
        admission.planned(4, 4, start + 3_600_080 * MS);
        assert!(admission.interval().unwrap().abs_diff(20 * MS) < MS);
        admission.planned(4, 0, start + 3_600_160 * MS);
        admission.planned(3, 0, start + 9_999_000 * MS);
        assert!(admission.interval().unwrap().abs_diff(20 * MS) < MS);
    }

    #[test]
    fn a_new_rate_is_learnt() {
        let (mut admission, mut now) = steady(None);
        for _ in 0..30 {
            now += 10 * MS;
            admission.planned(1, 20, now);
        }
        assert!(admission.interval().unwrap() < 13 * MS);
    }

    #[test]
    fn one_sample_moves_the_rate_by_an_eighth_and_several_at_once_by_as_many() {
        let (mut admission, now) = steady(None);
        admission.planned(1, 20, now + 900 * MS);
        assert!(admission.interval().unwrap().abs_diff(200 * MS) < MS);
        let (mut admission, now) = steady(Some(3000 * MS));
        admission.planned(4, 20, now + 80 * MS);
        // 20 + 80 * (7/8)^4
        assert!(admission.interval().unwrap().abs_diff(67 * MS) < MS);
        assert_eq!(admission.max_queue_time(), Some(3000 * MS));
    }

    #[test]
    fn the_limit_refuses_with_the_time_by_which_the_queue_is_short_enough() {
        let (admission, now) = steady(Some(1000 * MS));
        assert_eq!(admission.judge(arrival(9), now), Ok(()));
        let Err(RequestError::Overloaded { wait, limit, retry_after }) = admission.judge(arrival(25), now)
        else {
            panic!("2.5 s are over 1 s")
        };
        assert!(wait.abs_diff(2500 * MS) < MS && limit == 1000 * MS && retry_after.abs_diff(1500 * MS) < MS);
        let Err(RequestError::Overloaded { retry_after, .. }) = admission.judge(arrival(100_000), now) else {
            panic!("far over the limit")
        };
        assert_eq!(retry_after, HINTS.1);
    }

    #[test]
    fn a_deadline_refuses_only_where_the_queue_has_a_part_in_it() {
        let (admission, now) = steady(None);
        let asked = |ahead, service: u32, deadline: u32| {
            let arrival = Arrival { ahead, service: service * MS, deadline: Some(now + deadline * MS) };
            admission.judge(arrival, now)
        };
        assert_eq!(asked(5, 400, 1000), Ok(()));
        assert!(
            matches!(asked(7, 400, 1000), Err(RequestError::Overloaded { limit, .. }) if limit == 600 * MS)
        );
        assert_eq!(
            asked(0, 4000, 1000),
            Ok(()),
            "nobody is ahead: the estimate of the service alone refuses nobody"
        );
        assert_eq!(Admission::new(None).judge(arrival(1000), now), Ok(()), "no rate is known");
    }

    #[test]
    fn hints_are_bounded_and_have_a_fallback() {
        assert_eq!(retry_hint(None), FALLBACK);
        assert_eq!(retry_hint(Some(Duration::ZERO)), HINTS.0);
        assert_eq!(retry_hint(Some(Duration::MAX)), HINTS.1);
    }
}
