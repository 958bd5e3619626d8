//! Weighted fair shares of tenants: the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024,
//! algorithm 2), with weights.
//!
//! Each tenant has a counter of the service that it was given: a prompt token that had to be computed counts [`PROMPT_COST`], a generated one
//! [`GENERATED_COST`], divided by the tenant's weight. Whoever waits and has the smallest counter is admitted next. A tenant that comes back from having
//! nothing to wait for is lifted to the smallest counter of those that wait, so it cannot save service up; it keeps what it was given
//! too much.
//!
//! Bound (theorem 4.4): over any interval in which two tenants both wait, what they are given differs by at most
//! `2 * max(PROMPT_COST * longest prompt, GENERATED_COST * tokens that the batch can hold)`, by weight.

use std::collections::BTreeMap;

use crate::{
    ids::TenantId,
    planted::{Bug, planted},
};

/// What a computed prompt token counts.
pub const PROMPT_COST: u64 = 1;
/// What a generated token counts: it takes a step of its own.
pub const GENERATED_COST: u64 = 2;
/// Units of the counters per token, so that division by a weight loses nothing that matters.
const SCALE: u64 = 1 << 20;
/// Tenants beyond which those that have nothing to wait for are forgotten. Names are the clients' to choose.
const MAX_REMEMBERED: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Share {
    counter: u64,
    weight: u32,
}

/// What each tenant was given.
#[derive(Debug)]
pub(super) struct FairShares {
    weights: BTreeMap<TenantId, u32>,
    shares: BTreeMap<TenantId, Share>,
    /// Counter of the tenant that last ceased to wait.
    last_gone: u64,
}

impl FairShares {
    pub fn new(weights: BTreeMap<TenantId, u32>) -> Self {
        Self { weights, shares: BTreeMap::new(), last_gone: 0 }
    }

    fn counter(&self, tenant: &TenantId) -> u64 {
        self.shares.get(tenant).map_or(0, |share| share.counter)
    }

    fn share(&mut self, tenant: &TenantId) -> &mut Share {
        if !self.shares.contains_key(tenant) {
            let weight = self.weights.get(tenant).copied().unwrap_or(1).max(1);
            self.shares.insert(tenant.clone(), Share { counter: 0, weight });
        }
        self.shares.get_mut(tenant).expect("inserted above")
    }

    /// A tenant waits again; `waiting` are the others that do.
    pub fn comes_back<'a>(&mut self, tenant: &TenantId, waiting: impl Iterator<Item = &'a TenantId>) {
        let least = waiting.map(|other| self.counter(other)).min().unwrap_or(self.last_gone);
        let share = self.share(tenant);
        share.counter = if planted(Bug::IdlingSavesUp) { share.counter } else { share.counter.max(least) };
    }

    /// A tenant has nothing that waits any more; `is_waiting` says who has.
    pub fn goes(&mut self, tenant: &TenantId, is_waiting: impl Fn(&TenantId) -> bool) {
        self.last_gone = self.counter(tenant);
        if self.shares.len() > MAX_REMEMBERED {
            // Whoever was given least loses least by being forgotten: it would be lifted anyway when it comes back.
            let idle = self.shares.iter().filter(|(tenant, _)| !is_waiting(tenant));
            let mut idle: Vec<_> = idle.map(|(tenant, share)| (share.counter, tenant.clone())).collect();
            idle.sort_unstable();
            idle.iter().take(idle.len().div_ceil(2)).for_each(|(_, tenant)| {
                self.shares.remove(tenant);
            });
        }
    }

    /// Who of these was given least.
    pub fn least<'a>(&self, waiting: impl Iterator<Item = &'a TenantId>) -> Option<&'a TenantId> {
        waiting.min_by_key(|tenant| self.counter(tenant))
    }

    pub fn charge(&mut self, tenant: &TenantId, prompt_tokens: usize, generated_tokens: usize) {
        let generated_tokens = if planted(Bug::GenerationIsFree) { 0 } else { generated_tokens };
        let cost = PROMPT_COST * prompt_tokens as u64 + GENERATED_COST * generated_tokens as u64;
        let share = self.share(tenant);
        share.counter += cost * SCALE / u64::from(share.weight);
    }

    /// How much more a tenant was given than the least of these, in prompt tokens by weight.
    pub fn surplus<'a>(&self, tenant: &TenantId, waiting: impl Iterator<Item = &'a TenantId>) -> u64 {
        let least = waiting.map(|other| self.counter(other)).min().unwrap_or(0);
        self.counter(tenant).saturating_sub(least) / SCALE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idling_saves_nothing_up_and_forgives_nothing() {
        let [a, b, c] = ["a", "b", "c"].map(TenantId::new);
        let mut shares = FairShares::new(BTreeMap::from([(b.clone(), 2)]));
        shares.comes_back(&a, [].into_iter());
        shares.comes_back(&b, [&a].into_iter());
        shares.charge(&a, 100, 50);
        shares.charge(&b, 100, 50);
        assert_eq!(shares.surplus(&a, [&a, &b].into_iter()), 100, "b's tokens count half");
        shares.comes_back(&c, [&a, &b].into_iter());
        assert_eq!(shares.surplus(&c, [&a, &b].into_iter()), 0, "lifted to the least");
        shares.comes_back(&a, [&b, &c].into_iter());
        assert_eq!(shares.surplus(&a, [&b, &c].into_iter()), 100);
        assert_eq!(shares.least([&a, &c].into_iter()), Some(&c));
    }

    #[test]
    fn what_was_given_is_remembered_while_there_are_few_names_and_forgotten_when_there_are_many() {
        let [a, b, c] = ["a", "b", "c"].map(TenantId::new);
        let mut shares = FairShares::new(BTreeMap::new());
        shares.charge(&a, 10, 0);
        shares.charge(&b, 20, 0);
        shares.goes(&a, |_| false);
        assert_eq!(shares.least([&a, &c].into_iter()), Some(&c));
        (0..2 * MAX_REMEMBERED).for_each(|name| shares.charge(&TenantId::new(name.to_string()), 5, 0));
        shares.goes(&a, |_| false);
        assert!(shares.shares.len() <= MAX_REMEMBERED + 2, "half of them");
        assert_eq!(shares.counter(&b), 20 * SCALE, "who was given most is forgotten last");
    }

    #[test]
    fn who_waits_is_remembered_however_many_names_there_are() {
        let waiting = TenantId::new("waiting");
        let mut shares = FairShares::new(BTreeMap::new());
        shares.charge(&waiting, 1, 0);
        for name in 0..3 * MAX_REMEMBERED {
            let tenant = TenantId::new(name.to_string());
            shares.charge(&tenant, 5, 0);
            shares.goes(&tenant, |tenant| *tenant == waiting);
        }
        assert!(shares.shares.len() <= MAX_REMEMBERED + 1);
        assert_eq!(shares.counter(&waiting), SCALE);
    }
}
