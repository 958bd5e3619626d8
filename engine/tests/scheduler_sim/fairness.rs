//! I10: what tenants are given while they wait side by side.

use std::collections::{BTreeMap, BTreeSet};

use tidemill_engine::{
    ids::SeqId,
    scheduler::{
        Policy,
        fair::{GENERATED_COST, PROMPT_COST},
    },
};

use crate::scenario::{Config, TENANTS};

/// Common multiple of all weights, so that shares are whole numbers.
const UNIT: u64 = 60;

/// Service of all tenants, counted from outside the scheduler.
pub struct Service {
    is_fair: bool,
    weights: [u64; TENANTS],
    /// Sequences that wait for their first row and for nothing else.
    waiting: [BTreeSet<SeqId>; TENANTS],
    /// By weight, in 1/[`UNIT`] of what a prompt token costs.
    given: [u64; TENANTS],
    /// Tokens that a tenant's admitted sequences are still to generate.
    to_come: [BTreeMap<SeqId, u64>; TENANTS],
    /// The most that a tenant was to be given after it had been admitted: a prompt and `to_come`.
    ahead: [u64; TENANTS],
    /// Per pair that waits: the least and the greatest difference of what they were given, since both do.
    apart: BTreeMap<(usize, usize), (i64, i64)>,
    /// Pairs that waited together, counted once per change.
    pub compared: u64,
}

impl Service {
    pub fn new(config: &Config) -> Self {
        Self {
            is_fair: config.policy == Policy::Fair,
            weights: config.weights.map(u64::from),
            waiting: Default::default(),
            given: [0; TENANTS],
            to_come: Default::default(),
            ahead: [0; TENANTS],
            apart: BTreeMap::new(),
            compared: 0,
        }
    }

    /// A sequence waits for its first row. Completions that wait for another to read their prompt are left to the scheduler.
    pub fn queue(&mut self, seq: SeqId, tenant: usize) {
        if self.is_fair {
            self.waiting[tenant].insert(seq);
            self.compare();
        }
    }

    /// It waits no more.
    pub fn unqueue(&mut self, seq: SeqId, tenant: usize) {
        if self.is_fair && self.waiting[tenant].remove(&seq) {
            self.compare();
        }
    }

    /// It is gone.
    pub fn gone(&mut self, seq: SeqId, tenant: usize) {
        self.to_come[tenant].remove(&seq);
        self.unqueue(seq, tenant);
    }

    /// It got its first row.
    pub fn admitted(&mut self, seq: SeqId, tenant: usize, size: Size) {
        if !self.is_fair {
            return;
        }
        let prompt = PROMPT_COST * size.to_compute as u64;
        self.to_come[tenant].insert(seq, size.output as u64);
        let output = GENERATED_COST * self.to_come[tenant].values().sum::<u64>();
        self.ahead[tenant] = self.ahead[tenant].max(prompt + output);
        self.give(tenant, prompt);
        self.waiting[tenant].remove(&seq);
        self.compare();
    }

    /// It generated a token.
    pub fn generated(&mut self, seq: SeqId, tenant: usize) {
        if self.is_fair {
            if let Some(to_come) = self.to_come[tenant].get_mut(&seq) {
                *to_come = to_come.saturating_sub(1);
            }
            self.give(tenant, GENERATED_COST);
            self.compare();
        }
    }

    fn give(&mut self, tenant: usize, cost: u64) {
        self.given[tenant] += cost * UNIT / self.weights[tenant];
    }

    /// Theorem 4.4 of the paper that `scheduler::fair` names, with what one tenant's sequences really were to be given in place of what the batch can
    /// hold: whoever is admitted has been given least, so it gets ahead of another by no more than that, and the other of it.
    fn bound(&self, a: usize, b: usize) -> i64 {
        let ahead = |tenant: usize| (self.ahead[tenant] * UNIT).div_ceil(self.weights[tenant]);
        (ahead(a) + ahead(b)) as i64
    }

    fn compare(&mut self) {
        for a in 0..TENANTS {
            for b in a + 1..TENANTS {
                if self.waiting[a].is_empty() || self.waiting[b].is_empty() {
                    self.apart.remove(&(a, b));
                    continue;
                }
                let apart = self.given[a] as i64 - self.given[b] as i64;
                let (least, most) = self.apart.entry((a, b)).or_insert((apart, apart));
                (*least, *most) = ((*least).min(apart), (*most).max(apart));
                let (range, bound) = (*most - *least, self.bound(a, b));
                assert!(
                    range <= bound,
                    "I10: tenants {a} and {b} both wait and drift {range} apart, over {bound}"
                );
                self.compared += 1;
            }
        }
    }
}

/// What a sequence takes.
pub struct Size {
    /// Tokens of its prompt that were not found in the prefix cache.
    pub to_compute: usize,
    /// Tokens that it will generate when nobody stops it.
    pub output: usize,
}
