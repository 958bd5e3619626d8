//! Planning a step.

use std::{ops::Range, sync::Arc};

use super::{MAX_IN_FLIGHT, Scheduler, sequence::Place};
use crate::{
    ids::{BlockId, HostBlockId, SeqId, TokenId},
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

/// The tokens that a row computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenInput {
    /// These, at least one.
    Known(Vec<TokenId>),
    /// One: the token that the previous step samples for this row of its logits (see [`StepPlan::samples`]). The host need not know it.
    Sampled(u32),
}

impl TokenInput {
    /// Tokens of the row.
    pub fn num_tokens(&self) -> usize {
        match self {
            Self::Known(tokens) => tokens.len(),
            Self::Sampled(_) => 1,
        }
    }

    /// The tokens that the host knows.
    pub fn known(&self) -> &[TokenId] {
        match self {
            Self::Known(tokens) => tokens,
            Self::Sampled(_) => &[],
        }
    }
}

/// One sequence's share of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanRow {
    /// Whose.
    pub seq: SeqId,
    /// Position of the first token of `input`.
    pub start: usize,
    /// The tokens to compute.
    pub input: TokenInput,
    /// Blocks for positions `0..end()`.
    pub blocks: Vec<BlockId>,
    /// Present when the last token of `input` is the sequence's last: the next one is to be chosen.
    pub sample: Option<SamplePlan>,
    /// Prompt log-probabilities wanted in this row: `targets[i]` is scored at the position before it, `score_at.start + i`.
    pub score_at: Range<usize>,
    /// The prompt tokens to score, one per position of `score_at`.
    pub targets: Vec<TokenId>,
    /// How many of the most likely tokens to report for each target.
    pub score_top: u32,
}

impl PlanRow {
    /// The position after the row's last token.
    pub fn end(&self) -> usize {
        self.start + self.input.num_tokens()
    }
}

/// A step: rows of decode tokens and prompt chunks, mixed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepPlan {
    /// In the order in which they were planned.
    pub rows: Vec<PlanRow>,
    /// Blocks to be copied out to host memory before anything else of the step.
    pub saves: Vec<(BlockId, HostBlockId)>,
    /// Blocks to be copied in from host memory after the saves and before the rows are computed.
    pub loads: Vec<(HostBlockId, BlockId)>,
}

impl StepPlan {
    /// Tokens over all rows.
    pub fn num_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.input.num_tokens()).sum()
    }

    /// For each row that samples: its index in `rows`, and its row of logits. The step has one row of logits for
    /// each result that it gives: for each of `rows` its targets, then its sample.
    pub fn samples(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        let mut logits = 0;
        self.rows.iter().enumerate().filter_map(move |(index, row)| {
            logits += row.targets.len() as u32 + u32::from(row.sample.is_some());
            row.sample.as_ref().map(|_| (index, logits - 1))
        })
    }
}

impl Scheduler {
    /// Plans the next step; empty when nothing can run. A plan that is not empty must be launched, behind the step in flight if
    /// there is one, and be [resolved](Self::resolve) in its turn.
    ///
    /// Decode rows come first, so a long prompt never holds up a stream for longer than its chunk takes. When the blocks run
    /// out, the youngest sequence of the batch is preempted, so the oldest always advances. A step that preempted
    /// admits nobody: the blocks would only change hands.
    ///
    /// While a step is in flight nobody is preempted: what it computes would be lost, and it may end sequences and so give blocks
    /// back. A row that finds no block sits this step out, nobody is admitted, and the step after it is planned when nothing is in
    /// flight and the rule above decides. That costs the look-ahead once per shortage and can starve nobody.
    pub fn plan(&mut self) -> StepPlan {
        assert!(
            self.num_in_flight < MAX_IN_FLIGHT,
            "a plan reads only what the step right before it samples"
        );
        let mut plan = StepPlan::default();
        if self.num_in_flight == 0 {
            self.short_of_blocks = false;
        } else if self.short_of_blocks {
            return plan;
        }
        let mut budget = self.limits.max_num_batched_tokens;
        let preemptions = self.preemptions;
        let (decode, prefill): (Vec<_>, Vec<_>) = self
            .running
            .iter()
            .filter(|id| self.seqs[id].is_plannable())
            .partition(|id| self.seqs[id].num_missing() == 1);
        for id in decode.into_iter().chain(prefill) {
            // Its blocks may have gone to an older one meanwhile.
            if budget > 0 && self.running.binary_search(&id).is_ok() {
                self.plan_running(id, &mut budget, &mut plan);
            }
        }
        if self.preemptions == preemptions && !self.short_of_blocks {
            self.admit(&mut budget, &mut plan);
        }
        self.launched(&plan);
        plan
    }

    /// Notes what the sequences of a plan have in flight from now on.
    fn launched(&mut self, plan: &StepPlan) {
        for row in &plan.rows {
            self.seqs.get_mut(&row.seq).expect("planned just now").num_planned = row.end();
        }
        for (index, logits_row) in plan.samples() {
            self.seqs.get_mut(&plan.rows[index].seq).expect("planned just now").sampled_at = logits_row;
        }
        self.num_in_flight += usize::from(!plan.rows.is_empty());
    }

    fn plan_running(&mut self, id: SeqId, budget: &mut usize, plan: &mut StepPlan) {
        let chunk = self.seqs[&id].num_missing().min(*budget);
        while !self.reserve(id, chunk) {
            if self.num_in_flight > 0 {
                self.short_of_blocks = true;
                return;
            }
            let youngest = *self.running.last().expect("the sequence itself is in the batch");
            self.preempt(youngest);
            if let Some(row) = plan.rows.iter().position(|row| row.seq == youngest) {
                *budget += plan.rows.remove(row).input.num_tokens();
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
        seq.table.reserve(seq.num_planned + chunk)
    }

    fn preempt(&mut self, id: SeqId) {
        self.running.retain(|&other| other != id);
        self.seqs.get_mut(&id).expect("a running sequence is live").preempt();
        self.preemptions += 1;
    }

    /// Whether an older completion of the same request is about to compute the prompt that this one needs. In flight is not
    /// enough: if that row fails, nobody has written the blocks.
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
        seq.num_planned = seq.num_computed;
        seq.table = table;
    }

    fn unshare(&mut self, id: SeqId) {
        let seq = self.seqs.get_mut(&id).expect("only live sequences are planned");
        seq.table.release();
        (seq.num_computed, seq.num_planned) = (0, 0);
    }

    fn row(&self, id: SeqId, chunk: usize) -> PlanRow {
        let seq = &self.seqs[&id];
        let (start, end) = (seq.num_planned, seq.num_planned + chunk);
        let sample = (end == seq.num_tokens()).then(|| SamplePlan {
            sampling: seq.sampling.clone(),
            seed: seq.seed,
            position: end,
            token_counts: seq.token_counts.iter().map(|(&token, &count)| (token, count)).collect(),
            forbid_stops: end - seq.prompt_len < seq.sampling.min_tokens,
        });
        // The logits at position p say how likely the token at p + 1 is.
        let score_at = match seq.sampling.prompt_logprobs {
            Some(_) => seq.num_scored.max(start)..end.min(seq.prompt_len - 1),
            None => 0..0,
        };
        PlanRow {
            seq: id,
            start,
            input: match seq.tokens.get(start..end) {
                Some(tokens) => TokenInput::Known(tokens.to_vec()),
                None => TokenInput::Sampled(seq.sampled_at),
            },
            blocks: seq.table.ids().to_vec(),
            sample,
            targets: score_at.clone().map(|at| seq.tokens[at + 1]).collect(),
            score_at,
            score_top: seq.sampling.prompt_logprobs.unwrap_or(0),
        }
    }
}
