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
    /// Tokens that a tenant's admitted sequences have, or will have.
    admitted: [BTreeMap<SeqId, u64>; TENANTS],
    /// Most tokens that admitted sequences of one tenant had, or were to have.
    most_held: u64,
    longest_prompt: u64,
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
            admitted: Default::default(),
            most_held: 0,
            longest_prompt: 0,
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
        self.admitted[tenant].remove(&seq);
        self.unqueue(seq, tenant);
    }

    /// It got its first row; so many tokens of its prompt are to be computed.
    pub fn admitted(&mut self, seq: SeqId, tenant: usize, to_compute: usize, size: Size) {
        if !self.is_fair {
            return;
        }
        self.longest_prompt = self.longest_prompt.max(size.prompt as u64);
        self.admitted[tenant].insert(seq, (size.prompt + size.output) as u64);
        self.most_held = self.most_held.max(self.admitted[tenant].values().sum());
        self.give(tenant, PROMPT_COST * to_compute as u64);
        self.waiting[tenant].remove(&seq);
        self.compare();
    }

    /// It generated a token.
    pub fn generated(&mut self, tenant: usize) {
        if self.is_fair {
            self.give(tenant, GENERATED_COST);
            self.compare();
        }
    }

    fn give(&mut self, tenant: usize, cost: u64) {
        self.given[tenant] += cost * UNIT / self.weights[tenant];
    }

    /// Theorem 4.4 of the paper that `scheduler::fair` names, by weight. What the batch can hold is taken as what one tenant's
    /// sequences had at most between admission and end: preempted and parked ones will have a row again without asking.
    fn bound(&self, a: usize, b: usize) -> i64 {
        let weight = self.weights[a].min(self.weights[b]);
        let most = (PROMPT_COST * self.longest_prompt).max(GENERATED_COST * self.most_held);
        (2 * most * UNIT / weight) as i64
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
                assert!(range <= bound, "I10: tenants {a} and {b} both wait and drift {range} apart, over {bound}");
                self.compared += 1;
            }
        }
    }
}

/// What a sequence takes.
pub struct Size {
    pub prompt: usize,
    pub output: usize,
}
