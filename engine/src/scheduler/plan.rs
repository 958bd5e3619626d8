//! Planning a step.

use std::{ops::Range, sync::Arc};

use super::{Scheduler, sequence::Place};
use crate::{
    ids::{BlockId, SeqId, TokenId},
    sampling::Sampling,
};

/// How to choose a row's next token.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplePlan {
    /// The request's parameters.
    pub sampling: Arc<Sampling>,
    /// Key of the random stream.
    pub seed: u64,
    /// Position of the token to be chosen: the counter of the random stream.
    pub position: usize,
    /// Occurrences in the output of every token of prompt and output; empty without penalties.
    pub token_counts: Vec<(TokenId, u32)>,
    /// End-of-sequence and stop tokens may not be chosen yet.
    pub forbid_stops: bool,
}

/// One sequence's share of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanRow {
    /// Whose.
    pub seq: SeqId,
    /// Position of the first of `tokens`.
    pub start: usize,
    /// The tokens to compute, at least one.
    pub tokens: Vec<TokenId>,
    /// Blocks for positions `0..start + tokens.len()`.
    pub blocks: Vec<BlockId>,
    /// Present when the last of `tokens` is the sequence's last: the next one is to be chosen.
    pub sample: Option<SamplePlan>,
    /// Prompt log-probabilities wanted in this row: `targets[i]` is scored at the position before it, `score_at.start + i`.
    pub score_at: Range<usize>,
    /// The prompt tokens to score, one per position of `score_at`.
    pub targets: Vec<TokenId>,
    /// How many of the most likely tokens to report for each target.
    pub score_top: u32,
}

/// A step: rows of decode tokens and prompt chunks, mixed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepPlan {
    /// In the order in which they were planned.
    pub rows: Vec<PlanRow>,
}

impl StepPlan {
    /// Tokens over all rows.
    pub fn num_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.tokens.len()).sum()
    }
}

impl Scheduler {
    /// Plans the next step; empty when nothing can run.
    ///
    /// Decode rows come first, so a long prompt never holds up a stream for longer than its chunk takes. When the blocks run
    /// out, the youngest sequence of the batch is preempted, so the oldest always advances. A step that preempted
    /// admits nobody: the blocks would only change hands.
    pub fn plan(&mut self) -> StepPlan {
        let mut plan = StepPlan::default();
        let mut budget = self.limits.max_num_batched_tokens;
        let preemptions = self.preemptions;
        let (decode, prefill): (Vec<_>, Vec<_>) =
            self.running.iter().partition(|id| self.seqs[id].num_missing() == 1);
        for id in decode.into_iter().chain(prefill) {
            // Its blocks may have gone to an older one meanwhile.
            if budget > 0 && self.running.binary_search(&id).is_ok() {
                self.plan_running(id, &mut budget, &mut plan);
            }
        }
        if self.preemptions == preemptions {
            self.admit(&mut budget, &mut plan);
        }
        plan
    }

    fn plan_running(&mut self, id: SeqId, budget: &mut usize, plan: &mut StepPlan) {
        let chunk = self.seqs[&id].num_missing().min(*budget);
        while !self.reserve(id, chunk) {
            let youngest = *self.running.last().expect("the sequence itself is in the batch");
            self.preempt(youngest);
            if let Some(row) = plan.rows.iter().position(|row| row.seq == youngest) {
                *budget += plan.rows.remove(row).tokens.len();
            }
            if youngest == id {
                return;
            }
        }
        plan.rows.push(self.row(id, chunk));
        *budget -= chunk;
    }

    /// Gives free rows to waiting sequences, oldest first, while their first chunk finds blocks.
    fn admit(&mut self, budget: &mut usize, plan: &mut StepPlan) {
        if *budget == 0 || self.running.len() == self.limits.max_num_seqs {
            return;
        }
        let waiting: Vec<SeqId> =
            self.seqs.iter().filter(|(_, seq)| seq.place == Place::Queue).map(|(&id, _)| id).collect();
        for id in waiting {
            if *budget == 0 || self.running.len() == self.limits.max_num_seqs {
                break;
            }
            if self.waits_for_prompt(id) {
                continue;
            }
            self.share_prompt(id);
            let chunk = self.seqs[&id].num_missing().min(*budget);
            if !self.reserve(id, chunk) {
                // First come, first served: nobody overtakes. Whatever was shared goes back.
                self.unshare(id);
                break;
            }
            self.seqs.get_mut(&id).expect("listed above").place = Place::Batch;
            let at = self.running.partition_point(|&other| other < id);
            self.running.insert(at, id);
            plan.rows.push(self.row(id, chunk));
            *budget -= chunk;
        }
    }

    fn reserve(&mut self, id: SeqId, chunk: usize) -> bool {
        let seq = self.seqs.get_mut(&id).expect("only live sequences are planned");
        seq.table.reserve(seq.num_computed + chunk)
    }

    fn preempt(&mut self, id: SeqId) {
        self.running.retain(|&other| other != id);
        self.seqs.get_mut(&id).expect("a running sequence is live").preempt();
        self.preemptions += 1;
    }

    /// Whether an older completion of the same request is about to compute the prompt that this one needs.
    fn waits_for_prompt(&self, id: SeqId) -> bool {
        let owner = self.seqs[&id].prompt_of.and_then(|owner| self.seqs.get(&owner));
        owner.is_some_and(|owner| owner.num_computed < owner.prompt_len)
    }

    /// Takes over the full prompt blocks of an older completion of the same request. The prompt's last token is always
    /// computed anew: its logits choose the first token.
    fn share_prompt(&mut self, id: SeqId) {
        let seq = &self.seqs[&id];
        let Some(owner) = seq.prompt_of.and_then(|owner| self.seqs.get(&owner)) else { return };
        let blocks = (seq.prompt_len - 1) / self.pool.block_size();
        let table = owner.table.share_prefix(blocks);
        let seq = self.seqs.get_mut(&id).expect("read above");
        seq.num_computed = blocks * self.pool.block_size();
        seq.table = table;
    }

    fn unshare(&mut self, id: SeqId) {
        let seq = self.seqs.get_mut(&id).expect("only live sequences are planned");
        seq.table.release();
        seq.num_computed = 0;
    }

    fn row(&self, id: SeqId, chunk: usize) -> PlanRow {
        let seq = &self.seqs[&id];
        let (start, end) = (seq.num_computed, seq.num_computed + chunk);
        let sample = (end == seq.tokens.len()).then(|| SamplePlan {
            sampling: seq.sampling.clone(),
            seed: seq.seed,
            position: end,
            token_counts: seq.token_counts.iter().map(|(&token, &count)| (token, count)).collect(),
            forbid_stops: seq.completion_tokens() < seq.sampling.min_tokens,
        });
        // The logits at position p say how likely the token at p + 1 is.
        let score_at = match seq.sampling.prompt_logprobs {
            Some(_) => seq.num_scored.max(start)..end.min(seq.prompt_len - 1),
            None => 0..0,
        };
        PlanRow {
            seq: id,
            start,
            tokens: seq.tokens[start..end].to_vec(),
            blocks: seq.table.ids().to_vec(),
            sample,
            targets: score_at.clone().map(|at| seq.tokens[at + 1]).collect(),
            score_at,
            score_top: seq.sampling.prompt_logprobs.unwrap_or(0),
        }
    }
}
