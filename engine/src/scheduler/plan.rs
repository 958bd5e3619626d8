//! Planning a step.

use super::{MAX_IN_FLIGHT, Note, Scheduler, Sequence, StepPlan, sequence::Place};
use crate::{
    ids::SeqId,
    planted::{Bug, planted},
};

/// The prompts of a step under construction.
#[derive(Debug)]
pub(super) struct Prompts {
    /// Who, and how many tokens of it: 0 for those that wait for what is left over.
    pub chunks: Vec<(SeqId, usize)>,
    /// Tokens that prompts are to have of what the step has left.
    pub budget: usize,
    /// Tokens that the step has left.
    pub room: usize,
    /// A long prompt has its part of the step.
    has_long: bool,
}

impl Scheduler {
    /// Plans the next step; empty when nothing can run. A plan that is not empty must be launched, behind the step in flight if
    /// there is one, and be [resolved](Self::resolve) in its turn. `prefill_budget` says how many tokens prompts may have beside so many decode
    /// rows, within the limits; at least 1 where nothing decodes.
    ///
    /// Decode rows come first, so a prompt never holds up a stream for longer than its chunk takes. They compute a token each, and the tokens that
    /// a constraint forced behind it. Then come prompts in order of rank, then
    /// the queue. A long prompt (`long_prefill_token_threshold`) gets no more than its part until everybody else has had theirs, so short
    /// ones that come later need not wait for its end; only the oldest long one has a part at all, so that they are read one after the
    /// other. What is left over goes to the long ones in order.
    ///
    /// When a decode row finds no block, the last in rank is preempted, so the first always advances. A step that preempted
    /// admits nobody: the blocks would only change hands.
    ///
    /// While a step is in flight nobody is preempted: what it computes would be lost, and it may end sequences and so give blocks
    /// back. A row that finds no block sits this step out, nobody is admitted, and the step after it is planned when nothing is in
    /// flight and the rule above decides. That costs the look-ahead once per shortage and can starve nobody.
    pub fn plan(&mut self, prefill_budget: impl FnOnce(usize) -> usize) -> StepPlan {
        assert!(
            self.num_in_flight < MAX_IN_FLIGHT,
            "a plan reads only what the step right before it samples"
        );
        if self.num_in_flight == 0 {
            self.must_settle = false;
        } else if self.must_settle {
            return StepPlan::default();
        }
        let mut plan = self.spare.plan();
        self.make_way();
        let preemptions = self.preemptions;
        self.plan_decode(&mut plan);
        let decoded = plan.num_tokens();
        let left = self.limits.max_num_batched_tokens - decoded + usize::from(planted(Bug::BudgetByOne));
        let asked = prefill_budget(plan.rows.len()).max(usize::from(plan.rows.is_empty()));
        // What a row computes beyond one token costs what tokens of prompts cost. The first prompt advances nevertheless.
        let share = asked.saturating_sub(decoded - plan.rows.len());
        let budget = share.max(asked.min(1)).min(left);
        let mut chunks = std::mem::take(&mut self.spare.chunks);
        chunks.clear();
        let mut prompts = Prompts { chunks, budget, room: left, has_long: false };
        self.plan_prompts(&mut prompts);
        if !self.must_settle && self.preemptions == preemptions {
            self.admit(&mut prompts);
        }
        self.give_rest(&mut prompts);
        for &(id, chunk) in prompts.chunks.iter().filter(|(_, chunk)| *chunk > 0) {
            let row = self.spare.row(&self.seqs[&id], chunk);
            plan.rows.push(row);
        }
        self.spare.chunks = prompts.chunks;
        if plan.rows.is_empty() {
            self.spare.recycle(plan);
            return StepPlan::default();
        }
        self.launched(&mut plan);
        plan
    }

    /// Notes what the sequences of a plan have in flight from now on.
    fn launched(&mut self, plan: &mut StepPlan) {
        for row in &plan.rows {
            let seq = self.seqs.get_mut(&row.seq).expect("planned just now");
            seq.num_planned = row.end();
            if planted(Bug::UnresolvedBlock) {
                seq.table.register(&seq.tokens[..row.end().min(seq.tokens.len())]);
            }
        }
        for (index, logits_row) in plan.samples() {
            self.seqs.get_mut(&plan.rows[index].seq).expect("planned just now").sampled_at = logits_row;
        }
        self.num_in_flight += 1;
        self.slots.take_pending(&mut plan.adapters);
        self.pool.take_copies(&mut plan.saves, &mut plan.loads);
    }

    /// The newest token of each sequence that generates, in order of rank, with those that it forced: as many of them as leave everybody
    /// else a token.
    fn plan_decode(&mut self, plan: &mut StepPlan) {
        let mut at = 0;
        let mut spare = self.limits.max_num_batched_tokens - self.running.len();
        // Whoever is preempted is the last of the batch, so nobody moves that is still to come or has its row.
        while let Some(&id) = self.running.get(at) {
            at += 1;
            let seq = &self.seqs[&id];
            if !seq.is_plannable() || !seq.generates() {
                continue;
            }
            let forced = (seq.num_missing() - 1).min(spare);
            if self.make_room(id, 1 + if planted(Bug::ForcedWithoutRoom) { 0 } else { forced }) {
                spare -= forced;
                let row = self.spare.row(&self.seqs[&id], 1 + forced);
                plan.rows.push(row);
            }
        }
    }

    /// Finds blocks for a sequence's next tokens. False when it must sit this step out.
    fn make_room(&mut self, id: SeqId, tokens: usize) -> bool {
        loop {
            let seq = self.seqs.get_mut(&id).expect("only live sequences are planned");
            if seq.table.reserve(seq.num_planned + tokens) {
                return true;
            }
            if self.num_in_flight > 0 && !planted(Bug::PreemptsInFlight) {
                self.must_settle = true;
                return false;
            }
            let at = if planted(Bug::PreemptsOldest) { 0 } else { self.running.len() - 1 };
            let last = *self.running.get(at).expect("the sequence itself is in the batch");
            self.preempt(last);
            if last == id {
                return false;
            }
        }
    }

    /// Chunks for the prompts of the batch.
    fn plan_prompts(&mut self, prompts: &mut Prompts) {
        for at in 0..self.running.len() {
            let id = self.running[at];
            let seq = &self.seqs[&id];
            if seq.is_plannable() && !seq.generates() {
                prompts.give(seq, self.limits.long_prefill_token_threshold);
            }
        }
    }

    /// Gives what nobody else wants to long prompts.
    fn give_rest(&mut self, prompts: &mut Prompts) {
        for (id, chunk) in &mut prompts.chunks {
            let more = (self.seqs[id].num_missing() - *chunk).min(prompts.budget);
            *chunk += more;
            prompts.budget -= more;
        }
    }

    pub(super) fn preempt(&mut self, id: SeqId) {
        let seq = self.seqs.get_mut(&id).expect("a running sequence is live");
        debug_assert!(!seq.is_in_flight(), "what a step in flight computes would be lost");
        seq.num_preemptions += 1;
        seq.release(Place::Queue);
        let turn = seq.turn.clone();
        self.leave_batch(&turn);
        self.waiting.push(&turn);
        self.preemptions += 1;
        self.notes.push(Note::Preempted { seq: id });
    }
}

impl Prompts {
    /// Gives a prompt its part of the step.
    pub fn give(&mut self, seq: &Sequence, threshold: usize) {
        let missing = seq.num_missing();
        let chunk = match missing > threshold {
            _ if seq.is_whole && !planted(Bug::WholeCut) => missing,
            true if self.has_long => 0,
            true => {
                self.has_long = true;
                threshold.min(self.budget)
            }
            false => missing.min(self.budget),
        };
        self.chunks.push((seq.turn.id, chunk));
        self.budget = self.budget.saturating_sub(chunk);
        self.room = self.room.saturating_sub(chunk);
    }

    /// Whether the step takes a prompt in: one that is read in parts always, one that is not only if there is room for all of it. The budget
    /// is a wish, so the first of a step may exceed it: else one longer than any budget would wait for ever.
    pub fn takes(&self, is_whole: bool, missing: usize) -> bool {
        let is_first = self.chunks.iter().all(|&(_, chunk)| chunk == 0);
        let fits = missing <= self.budget || (is_first && missing <= self.room);
        !is_whole || fits || planted(Bug::WholeCut)
    }
}
