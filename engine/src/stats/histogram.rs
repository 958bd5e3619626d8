//! Distributions with fixed buckets.

use std::borrow::Cow;

/// From a millisecond to tens of minutes, as vLLM has it for the time to the first token; its dashboards know these buckets.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// As vLLM has it for the time between tokens.
const TOKEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// As vLLM has it for requests and their stages.
const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// As vLLM has it for the tokens of a step.
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
/// A microsecond to a second, three to the decade: bookkeeping on the host.
const HOST: &[f64] = &[
    1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5,
    1.0,
];
/// 100 microseconds to 50 seconds, three to the decade: steps on a device.
const DEVICE: &[f64] =
    &[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0];

/// Distributions since the start; seconds unless said otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct Histograms {
    /// From submission to the first token.
    pub time_to_first_token: Histogram,
    /// Between two tokens of one sequence.
    pub inter_token_latency: Histogram,
    /// From submission to the end, of requests that ended by stop or length.
    pub e2e_request_latency: Histogram,
    /// From submission to the first step.
    pub request_queue_time: Histogram,
    /// From the first step to the first token.
    pub request_prefill_time: Histogram,
    /// From the first token to the end, of requests that ended by stop or length.
    pub request_decode_time: Histogram,
    /// Tokens computed per step.
    pub iteration_tokens: Histogram,
    /// From the engine's receipt of an abort until everything was free.
    pub abort_to_free: Histogram,
    /// Planning a step.
    pub step_plan: Histogram,
    /// A step on the device.
    pub step_execute: Histogram,
    /// Taking a step's results in.
    pub step_resolve: Histogram,
}

impl Histograms {
    /// Takes over what another one holds, in the memory that is there.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        for (to, from) in self.all_mut().into_iter().zip(other.all()) {
            to.bounds.clone_from(&from.bounds);
            to.counts.clone_from(&from.counts);
            to.sum = from.sum;
        }
    }

    fn all(&self) -> [&Histogram; 11] {
        [
            &self.time_to_first_token,
            &self.inter_token_latency,
            &self.e2e_request_latency,
            &self.request_queue_time,
            &self.request_prefill_time,
            &self.request_decode_time,
            &self.iteration_tokens,
            &self.abort_to_free,
            &self.step_plan,
            &self.step_execute,
            &self.step_resolve,
        ]
    }

    fn all_mut(&mut self) -> [&mut Histogram; 11] {
        [
            &mut self.time_to_first_token,
            &mut self.inter_token_latency,
            &mut self.e2e_request_latency,
            &mut self.request_queue_time,
            &mut self.request_prefill_time,
            &mut self.request_decode_time,
            &mut self.iteration_tokens,
            &mut self.abort_to_free,
            &mut self.step_plan,
            &mut self.step_execute,
            &mut self.step_resolve,
        ]
    }
}

impl Default for Histograms {
    fn default() -> Self {
        Self {
            time_to_first_token: Histogram::new(FIRST_TOKEN),
            inter_token_latency: Histogram::new(TOKEN),
            e2e_request_latency: Histogram::new(REQUEST),
            request_queue_time: Histogram::new(REQUEST),
            request_prefill_time: Histogram::new(REQUEST),
            request_decode_time: Histogram::new(REQUEST),
            iteration_tokens: Histogram::new(STEP_TOKENS),
            abort_to_free: Histogram::new(HOST),
            step_plan: Histogram::new(HOST),
            step_execute: Histogram::new(DEVICE),
            step_resolve: Histogram::new(HOST),
        }
    }
}

/// How often values fell into which range.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    /// Upper bounds, inclusive, rising. The engine's own are constants; a copy that came over a wire owns them.
    pub bounds: Cow<'static, [f64]>,
    /// `bounds.len() + 1` counts, each of its own range: the last is for what is over the last bound.
    pub counts: Vec<u64>,
    /// Sum of all values.
    pub sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds: Cow::Borrowed(bounds), counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    pub(crate) fn record(&mut self, value: f64) {
        let range = self.bounds.partition_point(|&bound| bound < value);
        self.counts[range] += 1;
        self.sum += value;
    }

    pub(crate) fn record_duration(&mut self, duration: std::time::Duration) {
        self.record(duration.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_rise_and_are_inclusive_and_the_last_range_takes_the_rest() {
        for histogram in Histograms::default().all() {
            assert!(histogram.bounds.is_sorted_by(|a, b| a < b) && !histogram.bounds.is_empty());
        }
        let mut histogram = Histogram::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 2.0, 2.5, 100.0].into_iter().for_each(|value| histogram.record(value));
        assert_eq!((histogram.counts.as_slice(), histogram.sum), ([2, 2, 2].as_slice(), 107.5));
    }

    #[test]
    fn a_copy_holds_every_histogram() {
        let mut from = Histograms::default();
        from.all_mut().into_iter().zip(1..).for_each(|(h, n)| h.record(f64::from(n)));
        let mut to = Histograms::default();
        to.copy_from(&from);
        assert_eq!(to, from);
    }
}
