//! Makes a failing scenario small: delta debugging (Zeller, Hildebrandt, "Simplifying and isolating failure-inducing input", TSE
//! 2002) over its events, then over what is in them.

use std::time::{Duration, Instant};

use crate::{
    campaign::{Failure, attempt},
    model::Fate,
    scenario::{Arrival, Event, Scenario},
};

/// The smallest scenario found within the time that fails at the same place.
pub fn shrink(scenario: Scenario, failure: &Failure, limit: Duration) -> (Scenario, Failure) {
    let mut shrinking = Shrinking { best: scenario, failure: failure.clone(), until: Instant::now() + limit };
    shrinking.cut();
    let mut pinned = shrinking.best.clone();
    pinned.pin(&shrinking.failure.pins);
    shrinking.try_out(pinned);
    loop {
        let before = shrinking.best.clone();
        shrinking.drop_events();
        shrinking.simplify_events();
        shrinking.simplify_config();
        if shrinking.best == before || shrinking.is_late() {
            return (shrinking.best, shrinking.failure);
        }
    }
}

struct Shrinking {
    best: Scenario,
    failure: Failure,
    until: Instant,
}

impl Shrinking {
    fn is_late(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Takes a scenario over if it fails alike.
    fn try_out(&mut self, candidate: Scenario) -> bool {
        if self.is_late() || candidate == self.best {
            return false;
        }
        match attempt(&candidate) {
            Err(failure) if failure.place == self.failure.place => {
                (self.best, self.failure) = (candidate, failure);
                self.cut();
                true
            }
            _ => false,
        }
    }

    /// What comes after the failure does not matter.
    fn cut(&mut self) {
        self.best.events.truncate(self.failure.at + 1);
    }

    /// Leaves out parts of the list, large ones first.
    fn drop_events(&mut self) {
        let mut size = self.best.events.len().div_ceil(2).max(1);
        loop {
            let mut end = self.best.events.len();
            while end > 0 && !self.is_late() {
                let start = end.saturating_sub(size);
                let mut candidate = self.best.clone();
                candidate.events.drain(start..end);
                self.try_out(candidate);
                end = start.min(self.best.events.len());
            }
            if size == 1 {
                return;
            }
            size = size.div_ceil(2);
        }
    }

    fn simplify_events(&mut self) {
        let mut at = 0;
        while at < self.best.events.len() && !self.is_late() {
            for simpler in simpler_events(&self.best.events[at]) {
                let mut candidate = self.best.clone();
                if let Some(event) = candidate.events.get_mut(at) {
                    *event = simpler;
                    self.try_out(candidate);
                }
            }
            at += 1;
        }
    }

    fn simplify_config(&mut self) {
        let changes: [fn(&mut Scenario); 8] = [
            |s| s.config.depth = 1,
            |s| s.config.host_blocks = 0,
            |s| s.config.weights = [1; 4],
            |s| s.config.policy = Default::default(),
            |s| s.config.long_prefill_token_threshold = s.config.max_num_batched_tokens,
            |s| s.config.key = 0,
            |s| s.config.blocks = (s.config.blocks / 2).max(1),
            |s| s.config.blocks = (s.config.blocks - 1).max(1),
        ];
        for change in changes {
            loop {
                let mut candidate = self.best.clone();
                change(&mut candidate);
                if !self.try_out(candidate) {
                    break;
                }
            }
        }
    }
}

/// Simpler things that could happen in place of one.
fn simpler_events(event: &Event) -> Vec<Event> {
    match event {
        Event::Arrive(arrival) => simpler_arrivals(arrival).into_iter().map(Event::Arrive).collect(),
        Event::Plan { prefill, .. } => vec![Event::Plan { prefill: *prefill, eager: false }],
        _ => Vec::new(),
    }
}

fn simpler_arrivals(arrival: &Arrival) -> Vec<Arrival> {
    let changes: [fn(&mut Arrival); 19] = [
        |a| a.pooling = None,
        |a| a.fate = Fate::Healthy,
        |a| a.n = 1,
        |a| a.penalties = false,
        |a| a.form = false,
        |a| a.prompt_logprobs = false,
        |a| a.ignore_eos = true,
        |a| a.min_tokens = 0,
        |a| a.follows = None,
        |a| a.patience = None,
        |a| a.priority = 0,
        |a| a.tenant = 0,
        |a| a.salt = 0,
        |a| a.adapter = 0,
        |a| a.family = 0,
        |a| a.max_tokens = (a.max_tokens / 2).max(1),
        |a| a.max_tokens = (a.max_tokens - 1).max(1),
        |a| a.tail /= 2,
        |a| a.shared /= 2,
    ];
    let changed = changes.iter().map(|change| {
        let mut simpler = arrival.clone();
        change(&mut simpler);
        simpler
    });
    changed.filter(|simpler| simpler != arrival).collect()
}
