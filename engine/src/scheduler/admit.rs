//! From the queue into the batch.

use super::{Note, Policy, Scheduler, plan::Prompts, sequence::Place};
use crate::{
    ids::{BlockId, SeqId},
    kv::Fit,
};

impl Scheduler {
    /// Gives free rows to waiting sequences in the order of the policy, while their whole prompts find blocks, and tokens where they need them all at
    /// once. Nobody overtakes: where the head of the queue finds none, the others wait too. Where it finds no slot for its adapter, those without one may
    /// overtake.
    pub(super) fn admit(&mut self, prompts: &mut Prompts) {
        let mut wants_slot = false;
        while prompts.budget > 0 && self.running.len() < self.limits.max_num_seqs {
            let head = if wants_slot { self.head_without_adapter() } else { self.waiting.head() };
            let Some(id) = head else { return };
            if !self.has_slot(id, self.running.len()) {
                wants_slot = true;
                continue;
            }
            let fit = self.fit(id);
            let seq = &self.seqs[&id];
            if !self.has_room(fit) || !prompts.takes(seq.is_whole, seq.num_tokens()) {
                return;
            }
            self.take_in(id);
            prompts.give(&self.seqs[&id], self.limits.long_prefill_token_threshold);
        }
    }

    /// What it takes to take a waiting sequence in.
    pub(super) fn fit(&mut self, id: SeqId) -> Fit {
        self.fit_without(id, &[])
    }

    /// The same if one reference to each of these blocks were given back.
    fn fit_without(&mut self, id: SeqId, given_back: &[BlockId]) -> Fit {
        let seq = self.seqs.get_mut(&id).expect("whoever waits is live");
        let reusable = seq.reusable();
        seq.table.probe(&seq.tokens, reusable, given_back)
    }

    /// Whether there are blocks enough, with one for each running sequence besides: one that was just taken in would else be the next to be preempted.
    pub(super) fn has_room(&self, fit: Fit) -> bool {
        self.has_room_beside(self.running.len(), fit)
    }

    fn has_room_beside(&self, running: usize, fit: Fit) -> bool {
        fit.needed + running.min(self.pool.total() / 8) <= fit.available
    }

    fn take_in(&mut self, id: SeqId) {
        self.take_slot(id);
        let seq = self.seqs.get_mut(&id).expect("whoever waits is live");
        self.waiting.remove(&seq.turn);
        seq.table.prepare(seq.prompt_len + seq.sampling.max_tokens);
        let reusable = seq.reusable();
        let cached_tokens = seq.table.match_prefix(&seq.tokens, reusable);
        let fits = seq.table.reserve(seq.tokens.len());
        assert!(fits, "probed just now");
        (seq.num_computed, seq.num_planned) = (cached_tokens, cached_tokens);
        seq.place = Place::Batch;
        let resumed = seq.turn.resumed;
        // Where every hidden state is still to come, nothing is looked for.
        let looks = !seq.is_whole && seq.pooler.as_ref().is_none_or(|pooler| pooler.reusable() > 0);
        let looked_up = if looks { seq.tokens.len() } else { 0 };
        self.notes.push(Note::Admitted { seq: id, cached_tokens, looked_up, resumed });
        if !resumed {
            let to_compute = seq.tokens.len() - cached_tokens;
            self.waiting.charge(&seq.turn.tenant, to_compute, 0);
        }
        let turn = seq.turn.clone();
        let at = self.place_in_batch(&turn).expect_err("it was not in the batch");
        self.running.insert(at, id);
    }

    /// Under the policy of priorities: preempts sequences of strictly lower priority when the head of the queue can run only in their place, and
    /// would run then.
    pub(super) fn make_way(&mut self) {
        if self.policy != Policy::Priority {
            return;
        }
        let Some(head) = self.waiting.head() else { return };
        let priority = self.seqs[&head].turn.priority;
        let lower = self.running.partition_point(|id| self.seqs[id].turn.priority <= priority);
        let is_full = self.running.len() == self.limits.max_num_seqs;
        let fit = self.fit(head);
        let fits = !is_full && self.has_room(fit) && self.has_slot(head, self.running.len());
        if lower == self.running.len() || fits {
            return;
        }
        let theirs: Vec<BlockId> =
            self.running[lower..].iter().flat_map(|id| self.seqs[id].table.ids()).copied().collect();
        let fit = self.fit_without(head, &theirs);
        if !self.has_room_beside(lower, fit) || !self.has_slot(head, lower) {
            return;
        }
        if self.num_in_flight > 0 {
            self.must_settle = true;
            return;
        }
        while self.running.len() > lower {
            let fit = self.fit(head);
            let running = self.running.len();
            if running < self.limits.max_num_seqs && self.has_room(fit) && self.has_slot(head, running) {
                break;
            }
            self.preempt(*self.running.last().expect("more than those that stay"));
        }
    }
}
