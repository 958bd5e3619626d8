//! Which adapters are on the device, and who may have a place there.
//!
//! A batch holds rows of as many adapters as there are slots. A sequence whose adapter finds none waits until one is free: nobody in the batch
//! has the adapter that a slot holds. Meanwhile only sequences without an adapter overtake it: they need no slot, and whoever comes later with an
//! adapter cannot keep the slots taken for ever.
//!
//! What a slot is to hold travels with the next plan, in the order of steps. A step in flight may still have a row of the adapter that
//! goes, of a sequence that is gone: it was launched before, and where it is repeated nobody reads what comes of it.

use super::{Scheduler, Sequence};
use crate::{
    adapter::{Adapter, AdapterId, AdapterSlot},
    ids::SeqId,
    planted::{Bug, planted},
};

/// The slots of the device.
#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    /// Rises with every use.
    clock: u64,
    /// For the next plan.
    pending: Vec<(AdapterSlot, Adapter)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    holds: Option<AdapterId>,
    used: u64,
}

impl Slots {
    pub fn new(count: usize) -> Self {
        Self { slots: vec![Slot::default(); count], ..Self::default() }
    }

    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// The slot that an adapter has, or could have: one that nobody needs and that was not used for longest. `needs` says whether somebody needs
    /// the adapter that a slot holds.
    fn find(&self, id: AdapterId, needs: impl Fn(AdapterId) -> bool) -> Option<usize> {
        let has = self.slots.iter().position(|slot| slot.holds == Some(id));
        let needed = |slot: &Slot| slot.holds.is_some_and(&needs) && !planted(Bug::SlotTakenInUse);
        let free = || self.slots.iter().enumerate().filter(|(_, slot)| !needed(slot));
        has.or_else(|| free().min_by_key(|(_, slot)| slot.used).map(|(at, _)| at))
    }

    /// Gives an adapter this slot.
    fn take(&mut self, at: usize, adapter: &Adapter) -> AdapterSlot {
        let (slot, number) = (&mut self.slots[at], AdapterSlot(at as u32));
        self.clock += 1;
        slot.used = self.clock;
        if slot.holds != Some(adapter.id) {
            slot.holds = Some(adapter.id);
            if !planted(Bug::AdapterNotLoaded) {
                self.pending.push((number, adapter.clone()));
            }
        }
        number
    }

    /// What slots are to hold from the next plan on.
    pub fn take_pending(&mut self, adapters: &mut Vec<(AdapterSlot, Adapter)>) {
        adapters.append(&mut self.pending);
    }
}

impl Scheduler {
    /// Whether a waiting sequence could have a slot for its adapter if only the first `running` of the batch stayed there.
    pub(super) fn has_slot(&self, id: SeqId, running: usize) -> bool {
        self.slot_for(&self.seqs[&id], running).is_some()
    }

    /// `None`: there is no slot. `Some(None)`: it needs none.
    fn slot_for(&self, seq: &Sequence, running: usize) -> Option<Option<usize>> {
        let Some(adapter) = &seq.adapter else { return Some(None) };
        let stays = &self.running[..running];
        let needs = |id| stays.iter().any(|seq| self.seqs[seq].adapter.as_ref().is_some_and(|a| a.id == id));
        self.slots.find(adapter.id, needs).map(Some)
    }

    /// Gives a sequence that is about to come into the batch a slot for its adapter.
    pub(super) fn take_slot(&mut self, id: SeqId) {
        let slot = self.slot_for(&self.seqs[&id], self.running.len());
        if let Some(Some(at)) = slot
            && let Some(seq) = self.seqs.get_mut(&id)
            && let Some(adapter) = &seq.adapter
        {
            seq.slot = Some(self.slots.take(at, adapter));
        }
    }

    /// Whose turn it is among those that need no slot.
    pub(super) fn head_without_adapter(&self) -> Option<SeqId> {
        self.waiting.first_of(|id| self.seqs[&id].adapter.is_none())
    }
}
