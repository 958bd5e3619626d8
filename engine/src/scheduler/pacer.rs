//! How much of a prompt a step may read, so that running streams keep their pace.
//!
//! A step that reads prompts beside running streams makes all of them wait for its end. With a target for the inter-token latency the
//! pacer learns what steps cost, and gives prompts what the target leaves. Pure: it is told durations and reads no clock.
//!
//! The model is `duration = base + cost x prompt tokens`. `base` is learnt from steps that only decode, `cost` from the others as
//! `(duration - base) / tokens`. A base that is out of date does no lasting harm: the budget `(target - base) / cost` is the fixed point
//! of `budget x (target - base) / (duration - base)`, and there the duration is the target whatever `base` is. Both are medians of the newest samples, smoothed:
//! one outlier changes nothing, and a new speed is believed when it has shown twice.

use std::time::Duration;

/// The least that prompts are given: they always advance.
const LEAST: usize = 16;
/// Weight of a new sample. A change of speed is nine tenths learnt after four.
const WEIGHT: f64 = 0.5;

/// Adapts the prompt tokens of a step to a target inter-token latency.
#[derive(Debug, Clone)]
pub struct Pacer {
    /// Seconds.
    target: Option<f64>,
    max_num_batched_tokens: usize,
    /// Seconds of a step that reads no prompt.
    base: Learnt,
    /// Seconds that a prompt token adds.
    cost: Learnt,
    /// No budget is over this: what a step that is twice as long as any before it costs is a guess.
    ceiling: usize,
}

impl Pacer {
    /// A pacer that has seen nothing. Without a target it still learns, and gives everything.
    pub fn new(target_itl: Option<Duration>, max_num_batched_tokens: usize) -> Self {
        Self {
            target: target_itl.map(|target| target.as_secs_f64()),
            max_num_batched_tokens,
            base: Learnt::default(),
            cost: Learnt::default(),
            ceiling: 4 * LEAST,
        }
    }

    /// Takes a step in: its rows that decoded, the prompt tokens that it read, and how long the device was busy with it.
    pub fn observe(&mut self, decode_rows: usize, prefill_tokens: usize, duration: Duration) {
        let seconds = duration.as_secs_f64();
        if prefill_tokens == 0 {
            self.base.observe(seconds, WEIGHT);
            return;
        }
        if decode_rows > 0 {
            // A step costs at least its base, so one that is quicker shows that the base is too high. Without this, a base over the target
            // would keep prompts at the least for as long as there are any.
            if self.base.value.is_some_and(|base| base > seconds) {
                self.base.observe(seconds, WEIGHT);
            }
            // The end of a prompt is shorter than it might have been and says nothing about what fits.
            if 2 * prefill_tokens >= self.prefill_budget(decode_rows) {
                self.ceiling = 2 * prefill_tokens.max(LEAST);
            }
        }
        // Of short prompts the noise is larger than the cost.
        let usual = self.prefill_budget(1).min(self.ceiling);
        let weight = WEIGHT * (prefill_tokens as f64 / usual as f64).min(1.0);
        let base = self.base.value.unwrap_or(0.0).min(seconds);
        self.cost.observe((seconds - base) / prefill_tokens as f64, weight);
    }

    /// Prompt tokens that the next step may read beside so many rows that decode.
    pub fn prefill_budget(&self, decode_rows: usize) -> usize {
        let Some(target) = self.target.filter(|_| decode_rows > 0) else {
            return self.max_num_batched_tokens;
        };
        let left = (target - self.base.value.unwrap_or(0.0)).max(0.0);
        let fits = match self.cost.value {
            // A division by zero gives infinity, or NaN where nothing is left; `as` makes the largest and 0 of them.
            Some(cost) => (left / cost) as usize,
            None => LEAST,
        };
        fits.min(self.ceiling).max(LEAST).min(self.max_num_batched_tokens)
    }

    /// What a step takes that reads no prompt, once one has been seen.
    pub fn step_time(&self) -> Option<Duration> {
        self.base.value.map(Duration::from_secs_f64)
    }

    /// What so many prompt tokens take at least, beyond the steps that read them; zero while that is not known.
    pub fn prefill_time(&self, tokens: usize) -> Duration {
        Duration::from_secs_f64(self.cost.value.unwrap_or(0.0) * tokens as f64)
    }
}

/// A figure that is learnt from noisy samples.
#[derive(Debug, Clone, Default)]
struct Learnt {
    value: Option<f64>,
    /// The two samples before the newest one.
    recent: [Option<f64>; 2],
}

impl Learnt {
    fn observe(&mut self, sample: f64, weight: f64) {
        let median = match self.recent {
            [Some(a), Some(b)] => a.min(b).max(a.max(b).min(sample)),
            // Too few to tell an outlier: what is lower does less harm, as only waiting makes a step longer than it need be.
            [a, b] => sample.min(a.unwrap_or(sample)).min(b.unwrap_or(sample)),
        };
        self.recent = [self.recent[1], Some(sample)];
        self.value = Some(self.value.map_or(median, |value| value + weight * (median - value)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device: milliseconds for the weights, per row, per prompt token, and per prompt token and thousand positions before it.
    #[derive(Clone, Copy)]
    struct Machine {
        base: f64,
        row: f64,
        token: f64,
        context: f64,
    }

    const GPU: Machine = Machine { base: 8.0, row: 0.02, token: 0.04, context: 0.01 };

    struct Run {
        pacer: Pacer,
        machine: Machine,
        random: u64,
        /// Share by which durations vary to both sides.
        noise: f64,
        /// Tokens of the prompt that have been read.
        position: usize,
    }

    impl Run {
        fn new(target_ms: u64, machine: Machine) -> Self {
            let pacer = Pacer::new(Some(Duration::from_millis(target_ms)), 2048);
            Self { pacer, machine, random: 1, noise: 0.1, position: 0 }
        }

        /// Uniform in [-1, 1): xorshift64.
        fn uniform(&mut self) -> f64 {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            (self.random >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        }

        fn ideal(&self, rows: usize, tokens: usize) -> f64 {
            let m = self.machine;
            let token = m.token + m.context * self.position as f64 / 1000.0;
            m.base + m.row * rows as f64 + token * tokens as f64
        }

        /// One step beside `rows` with as much of an endless prompt as the pacer allows; its tokens and milliseconds without the noise.
        fn step(&mut self, rows: usize) -> (usize, f64) {
            let tokens = self.pacer.prefill_budget(rows);
            (tokens, self.given(rows, tokens))
        }

        fn steps(&mut self, count: usize, rows: usize) {
            for _ in 0..count {
                self.step(rows);
            }
        }

        /// Steps that read no prompt.
        fn decode(&mut self, count: usize, rows: usize) {
            for _ in 0..count {
                self.given(rows, 0);
            }
        }

        fn given(&mut self, rows: usize, tokens: usize) -> f64 {
            let ideal = self.ideal(rows, tokens);
            let noisy = ideal * (1.0 + self.noise * self.uniform());
            self.pacer.observe(rows, tokens, Duration::from_secs_f64(noisy / 1000.0));
            ideal
        }
    }

    #[test]
    fn without_a_target_or_without_streams_prompts_get_everything() {
        let free = Pacer::new(None, 2048);
        assert_eq!([free.prefill_budget(0), free.prefill_budget(200)], [2048, 2048]);
        let mut run = Run::new(20, GPU);
        run.steps(50, 8);
        assert_eq!(run.pacer.prefill_budget(0), 2048);
        assert!(run.pacer.prefill_budget(8) < 1000);
    }

    #[test]
    fn steps_come_close_to_the_target_and_stay_there() {
        for (seed, target) in [(3, 15), (5, 20), (7, 50)] {
            let mut run = Run { random: seed, ..Run::new(target, GPU) };
            run.decode(20, 8);
            // From the least to what fits in doublings.
            run.steps(12, 8);
            let (mut all, mut worst) = (0.0, 0.0f64);
            for _ in 0..300 {
                run.position = (run.position + 100) % 2000;
                let (_, ms) = run.step(8);
                all += ms / 300.0;
                worst = worst.max(ms);
            }
            let target = target as f64;
            assert!((0.85 * target..1.1 * target).contains(&all), "target {target}: mean {all}");
            assert!(worst < 1.35 * target, "target {target}: worst {worst}");
        }
    }

    #[test]
    fn no_step_on_the_way_there_is_far_over_the_target() {
        for seed in 1..200 {
            let mut run = Run { random: seed, ..Run::new(20, GPU) };
            // The first prompt is read alone.
            run.given(0, 2048);
            run.decode(3, 1);
            for step in 0..30 {
                let (tokens, ms) = run.step(1);
                assert!(ms < 1.5 * 20.0, "seed {seed}, step {step}: {tokens} tokens take {ms} ms");
            }
        }
    }

    #[test]
    fn a_wild_outlier_changes_nothing_much() {
        let mut run = Run { noise: 0.02, ..Run::new(20, GPU) };
        run.decode(20, 8);
        run.steps(40, 8);
        let before = run.pacer.prefill_budget(8);
        let tokens = before;
        run.pacer.observe(8, tokens, Duration::from_secs(5));
        run.pacer.observe(8, 0, Duration::from_secs(5));
        run.pacer.observe(8, tokens, Duration::from_nanos(1));
        for _ in 0..3 {
            let now = run.pacer.prefill_budget(8);
            assert!(now.abs_diff(before) * 5 < before, "{before} before, {now} after");
            run.step(8);
        }
    }

    #[test]
    fn another_speed_is_learnt_within_a_few_steps() {
        let slow = Machine { base: 12.0, token: 0.16, ..GPU };
        let mut run = Run::new(20, GPU);
        run.decode(20, 8);
        run.steps(40, 8);
        run.machine = slow;
        run.steps(8, 8);
        for _ in 0..50 {
            let (_, ms) = run.step(8);
            assert!((0.6 * 20.0..1.4 * 20.0).contains(&ms), "{ms} ms on the slower machine");
        }
        run.machine = GPU;
        run.steps(12, 8);
        let (tokens, ms) = run.step(8);
        assert!((0.75 * 20.0..1.35 * 20.0).contains(&ms), "{tokens} tokens, {ms} ms on the quicker machine");
    }

    #[test]
    fn more_rows_and_a_longer_context_leave_less_for_prompts() {
        let mut run = Run { noise: 0.05, ..Run::new(30, GPU) };
        run.decode(20, 1);
        run.steps(20, 1);
        let few = run.pacer.prefill_budget(1);
        // No step without a prompt follows, so the base is out of date from here on.
        for step in 0..200 {
            run.position += 20;
            let (tokens, ms) = run.step(256);
            assert!(step < 8 || ms < 1.25 * 30.0, "step {step}: {tokens} tokens take {ms} ms");
        }
        assert!(run.pacer.prefill_budget(256) < few * 3 / 4);
    }

    #[test]
    fn prompts_advance_where_nothing_fits_and_get_more_once_it_does() {
        let mut run = Run { noise: 0.02, ..Run::new(5, GPU) };
        run.decode(20, 8);
        (0..40).for_each(|_| assert_eq!(run.step(8).0, LEAST));
        run.machine = Machine { base: 1.0, row: 0.0, ..GPU };
        run.steps(20, 8);
        assert!(run.pacer.prefill_budget(8) > 4 * LEAST, "the base has been lowered by mixed steps alone");
    }

    #[test]
    fn what_a_request_will_take_is_told_once_it_was_seen() {
        let mut pacer = Pacer::new(None, 1000);
        assert_eq!((pacer.step_time(), pacer.prefill_time(100)), (None, Duration::ZERO));
        pacer.observe(8, 0, Duration::from_millis(10));
        pacer.observe(8, 1000, Duration::from_millis(510));
        assert_eq!(pacer.step_time(), Some(Duration::from_millis(10)));
        let prefill = pacer.prefill_time(100);
        assert!(prefill.abs_diff(Duration::from_millis(50)) < Duration::from_micros(1), "{prefill:?}");
    }

    #[test]
    fn a_budget_is_never_over_the_step() {
        let mut tiny = Pacer::new(Some(Duration::from_secs(1)), 8);
        assert_eq!(tiny.prefill_budget(1), 8);
        tiny.observe(1, 8, Duration::ZERO);
        assert_eq!(tiny.prefill_budget(1), 8);
    }
}
