//! The queue: who is admitted next.

use std::collections::{BTreeMap, BTreeSet};

use super::{Policy, fair::FairShares};
use crate::{
    ids::{SeqId, TenantId},
    planted::{Bug, planted},
};

/// What decides about a sequence's turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Turn {
    pub id: SeqId,
    pub priority: i32,
    pub tenant: TenantId,
    /// It had a row before: it goes to the head of its class, before whoever never had one.
    pub resumed: bool,
}

/// Waiting sequences in the order of a policy.
#[derive(Debug)]
pub(super) struct Waiting {
    order: Order,
    len: usize,
}

#[derive(Debug)]
enum Order {
    /// By priority (0 for all where it does not count), resumed ones first, then by arrival.
    Static {
        by_priority: bool,
        queue: BTreeSet<(i32, bool, SeqId)>,
    },
    Fair {
        resumed: BTreeSet<SeqId>,
        queues: BTreeMap<TenantId, BTreeSet<SeqId>>,
        shares: FairShares,
    },
}

impl Waiting {
    pub fn new(policy: Policy, weights: BTreeMap<TenantId, u32>) -> Self {
        let order = match policy {
            Policy::Fcfs => Order::Static { by_priority: false, queue: BTreeSet::new() },
            Policy::Priority => Order::Static { by_priority: true, queue: BTreeSet::new() },
            Policy::Fair => Order::Fair {
                resumed: BTreeSet::new(),
                queues: BTreeMap::new(),
                shares: FairShares::new(weights),
            },
        };
        Self { order, len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn push(&mut self, turn: &Turn) {
        let new = match &mut self.order {
            Order::Static { by_priority, queue } => {
                queue.insert((if *by_priority { turn.priority } else { 0 }, !turn.resumed, turn.id))
            }
            Order::Fair { resumed, .. } if turn.resumed => resumed.insert(turn.id),
            Order::Fair { queues, shares, .. } => {
                if !queues.contains_key(&turn.tenant) {
                    shares.comes_back(&turn.tenant, queues.keys());
                }
                queues.entry(turn.tenant.clone()).or_default().insert(turn.id)
            }
        };
        debug_assert!(new, "a sequence waits once");
        self.len += usize::from(new);
    }

    /// Takes a sequence out that waits.
    pub fn remove(&mut self, turn: &Turn) {
        let was = match &mut self.order {
            Order::Static { by_priority, queue } => {
                queue.remove(&(if *by_priority { turn.priority } else { 0 }, !turn.resumed, turn.id))
            }
            Order::Fair { resumed, .. } if turn.resumed => resumed.remove(&turn.id),
            Order::Fair { queues, shares, .. } => {
                let queue = queues.get_mut(&turn.tenant);
                let was = queue.is_some_and(|queue| queue.remove(&turn.id));
                if queues.get(&turn.tenant).is_some_and(BTreeSet::is_empty) {
                    queues.remove(&turn.tenant);
                    shares.goes(&turn.tenant, |tenant| queues.contains_key(tenant));
                }
                was
            }
        };
        debug_assert!(was, "only what waits is taken out");
        self.len -= usize::from(was);
    }

    /// Whose turn it is.
    pub fn head(&self) -> Option<SeqId> {
        match &self.order {
            Order::Static { queue, .. } if planted(Bug::Overtaking) => queue.last().map(|&(_, _, id)| id),
            Order::Static { queue, .. } => queue.first().map(|&(_, _, id)| id),
            Order::Fair { resumed, queues, shares } => {
                let fair = || {
                    let tenant = shares.least(queues.keys())?;
                    queues[tenant].first().copied()
                };
                resumed.first().copied().or_else(fair)
            }
        }
    }

    /// Whose turn it would be if only those waited that `is_meant` names.
    pub fn first_of(&self, is_meant: impl Fn(SeqId) -> bool) -> Option<SeqId> {
        let first = |queue: &BTreeSet<SeqId>| queue.iter().copied().find(|id| is_meant(*id));
        match &self.order {
            Order::Static { queue, .. } => queue.iter().map(|&(_, _, id)| id).find(|id| is_meant(*id)),
            Order::Fair { resumed, queues, shares } => first(resumed).or_else(|| {
                let tenants = queues.iter().filter(|(_, queue)| first(queue).is_some());
                first(&queues[shares.least(tenants.map(|(tenant, _)| tenant))?])
            }),
        }
    }

    /// The first `count` in the order in which they are served; under fair shares, whoever had a row before and then the others by arrival.
    pub fn first(&self, count: usize) -> Vec<SeqId> {
        match &self.order {
            Order::Static { queue, .. } => queue.iter().take(count).map(|&(_, _, id)| id).collect(),
            Order::Fair { resumed, queues, .. } => {
                let mut fresh: Vec<_> = queues.values().flat_map(|queue| queue.iter().take(count)).collect();
                fresh.sort_unstable();
                resumed.iter().chain(fresh).take(count).copied().collect()
            }
        }
    }

    /// Charges a tenant for what it is given. Without effect under policies that do not count it.
    pub fn charge(&mut self, tenant: &TenantId, prompt_tokens: usize, generated_tokens: usize) {
        if let Order::Fair { shares, .. } = &mut self.order {
            shares.charge(tenant, prompt_tokens, generated_tokens);
        }
    }

    /// How much more a tenant was given than the one that waits and was given least.
    pub fn surplus(&self, tenant: &TenantId) -> u64 {
        match &self.order {
            Order::Static { .. } => 0,
            Order::Fair { queues, shares, .. } => shares.surplus(tenant, queues.keys()),
        }
    }

    /// About how many are served before a sequence that waits, or would come now when `id` is higher than all.
    pub fn ahead(&self, turn: &Turn) -> usize {
        match &self.order {
            Order::Static { by_priority, queue } => {
                let priority = if *by_priority { turn.priority } else { 0 };
                queue.range(..(priority, !turn.resumed, turn.id)).count()
            }
            Order::Fair { resumed, .. } if turn.resumed => resumed.range(..turn.id).count(),
            Order::Fair { resumed, queues, .. } => {
                let own = queues.get(&turn.tenant).map_or(0, |queue| queue.range(..turn.id).count());
                // Others are served about as often as it is, while they have something.
                let others = queues.iter().filter(|(tenant, _)| **tenant != turn.tenant);
                resumed.len() + own + others.map(|(_, queue)| queue.len().min(own + 1)).sum::<usize>()
            }
        }
    }
}
