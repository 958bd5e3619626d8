//! Why a sequence waits.

use super::{
    Policy, Scheduler, Stage, WaitReason,
    sequence::{Place, Sequence},
    waiting::Turn,
};
use crate::ids::{SeqId, TenantId};

/// Where a live sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Where it is in its work.
    pub stage: Stage,
    /// Why it has no part of the steps in flight; `None` when it has, or when it will have one in the next.
    pub waits_for: Option<WaitReason>,
    /// About how many sequences are served before it, while it waits for a row.
    pub ahead: usize,
    /// It had a row and lost it to others.
    pub is_preempted: bool,
    /// Its client does not read, and it is scheduled no more.
    pub is_parked: bool,
    /// Tokens whose keys and values are in its blocks.
    pub num_computed: usize,
    /// Blocks that it references.
    pub kv_blocks: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Times it was preempted.
    pub num_preemptions: usize,
}

impl Scheduler {
    /// Where a sequence stands and why it waits, if it is live.
    pub fn explain(&mut self, id: SeqId) -> Option<Standing> {
        let waits_for = self.why(id);
        let seq = self.seqs.get(&id)?;
        Some(Standing {
            stage: seq.stage(),
            waits_for,
            ahead: if seq.place == Place::Queue { self.waiting.ahead(&seq.turn) } else { 0 },
            is_preempted: seq.place == Place::Queue && seq.turn.resumed,
            is_parked: seq.place == Place::Parked,
            num_computed: seq.num_computed,
            kv_blocks: seq.table.ids().len(),
            completion_tokens: seq.completion_tokens(),
            num_preemptions: seq.num_preemptions,
        })
    }

    fn why(&mut self, id: SeqId) -> Option<WaitReason> {
        let seq = self.seqs.get(&id)?;
        match seq.place {
            Place::Held => Some(WaitReason::Prompt),
            Place::Parked => Some(WaitReason::Reader),
            Place::Batch => self.why_without_row(seq),
            Place::Queue => self.why_queued(id),
        }
    }

    /// Within the batch only blocks or tokens of the step can be missing.
    fn why_without_row(&self, seq: &Sequence) -> Option<WaitReason> {
        if seq.is_in_flight() || self.num_in_flight == 0 {
            return None;
        }
        let available = self.pool.counts();
        let no_block = seq.table.capacity() < seq.num_tokens() && available.free + available.cached == 0;
        Some(match no_block {
            true => WaitReason::Blocks { needed: 1, available: 0 },
            false => WaitReason::Budget { max_num_batched_tokens: self.limits.max_num_batched_tokens },
        })
    }

    fn why_queued(&mut self, id: SeqId) -> Option<WaitReason> {
        if self.running.len() == self.limits.max_num_seqs {
            return Some(WaitReason::Rows { max_num_seqs: self.limits.max_num_seqs });
        }
        let turn = &self.seqs[&id].turn;
        let (ahead, surplus) = (self.waiting.ahead(turn), self.waiting.surplus(&turn.tenant));
        if self.policy == Policy::Fair && surplus > 0 && !turn.resumed {
            return Some(WaitReason::Fairness { surplus });
        }
        // How many are ahead is an estimate; who is the first is not.
        if ahead > 0 && self.waiting.head() != Some(id) {
            return Some(WaitReason::Turn { ahead });
        }
        if !self.has_slot(id, self.running.len()) {
            return Some(WaitReason::Adapter { max_loras: self.slots.count() });
        }
        let fit = self.fit(id);
        let (seq, step) = (&self.seqs[&id], self.limits.max_num_batched_tokens);
        match self.has_room(fit) {
            // The others of the batch have at least a token each.
            true if seq.is_whole && seq.num_tokens() + self.running.len() > step => {
                Some(WaitReason::Budget { max_num_batched_tokens: step })
            }
            true => None,
            false => Some(WaitReason::Blocks { needed: fit.needed, available: fit.available }),
        }
    }

    /// About how many waiting sequences would be served before one that came now.
    pub fn ahead_of_new(&self, priority: i32, tenant: &TenantId) -> usize {
        let turn = Turn { id: SeqId(u64::MAX), priority, tenant: tenant.clone(), resumed: false };
        self.waiting.ahead(&turn)
    }
}
