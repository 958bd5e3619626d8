//! What a step's results mean.

use super::{PlanRow, Scheduler, StepPlan};
use crate::{
    ids::{SeqId, TokenId},
    output::{FinishReason, MatchedStop, TokenLogprobs},
    planted::{Bug, planted},
};

/// What the runner found for one row.
#[derive(Debug, Clone, PartialEq)]
pub struct RowOutput {
    /// The next token, when the row asked for one.
    pub sampled: Option<TokenId>,
    /// Its log-probabilities, when they were asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// One per scored prompt position.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// `[P, H]` the hidden states of the P positions of [`PlanRow::pool_at`].
    pub states: Vec<f32>,
}

/// A row's result. A row that fails takes no other down.
#[derive(Debug, Clone, PartialEq)]
pub enum RowResult {
    /// It was computed.
    Done(RowOutput),
    /// The model gave no finite logits.
    NotFinite,
    /// The runner failed on this row, even alone.
    Failed(String),
}

/// The results of a step, one per row of its plan, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    /// In the plan's order.
    pub rows: Vec<RowResult>,
}

/// What a result changes outside the scheduler; the ledger applies it.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Some prompt positions were scored.
    PromptLogprobs {
        /// Whose.
        seq: SeqId,
        /// In order of position.
        logprobs: Vec<TokenLogprobs>,
    },
    /// A token was generated.
    Token {
        /// Whose.
        seq: SeqId,
        /// The token.
        token: TokenId,
        /// When asked for.
        logprobs: Option<TokenLogprobs>,
        /// Present when it is the sequence's last: the sequence is gone from the scheduler.
        finish: Option<(FinishReason, Option<MatchedStop>)>,
        /// Times the sequence had been preempted.
        num_preemptions: usize,
    },
    /// A sequence that was to give an embedding has given it, and is gone from the scheduler.
    Embedding {
        /// Whose.
        seq: SeqId,
        /// `[H]` what the hidden states that count come to.
        values: Vec<f32>,
        /// Times the sequence had been preempted.
        num_preemptions: usize,
    },
    /// What the sequence had to form is complete: it ends with the tokens before, and is gone from the scheduler.
    Complete {
        /// Whose.
        seq: SeqId,
    },
    /// The sequence cannot keep the form it must have, and is gone from the scheduler.
    Unformed {
        /// Whose.
        seq: SeqId,
        /// Position of the token that could not be chosen.
        position: usize,
        /// Why, in words for the client.
        error: String,
    },
    /// The sequence cannot go on and is gone from the scheduler.
    Failed {
        /// Whose.
        seq: SeqId,
        /// Position of the token that could not be chosen.
        position: usize,
        /// What the runner said; `None` when the logits were not finite.
        error: Option<String>,
    },
}

impl Scheduler {
    /// Takes the results of the oldest step in flight in; what they change goes to the end of `effects`. Rows whose sequence is gone meanwhile are
    /// skipped: aborted, or ended by the step before, when this one had been planned already.
    pub fn resolve(&mut self, plan: StepPlan, output: StepOutput, effects: &mut Vec<Effect>) {
        debug_assert_eq!(plan.rows.len(), output.rows.len(), "one result per row");
        self.num_in_flight = self.num_in_flight.checked_sub(1).expect("what was planned is resolved once");
        self.pool.loaded(&plan.loads);
        self.advance_forms(&plan, &output);
        for (row, result) in plan.rows.iter().zip(output.rows) {
            if planted(Bug::LateToken) && !self.seqs.contains_key(&row.seq) && row.sample.is_some() {
                let (seq, token) = (row.seq, TokenId(0));
                effects.push(Effect::Token { seq, token, logprobs: None, finish: None, num_preemptions: 0 });
            }
            if let Some(seq) = self.seqs.get_mut(&row.seq) {
                match result {
                    RowResult::Done(output) => {
                        seq.computed(row.end());
                        self.take_output(row, output, effects);
                    }
                    RowResult::NotFinite if row.sample.as_ref().is_some_and(|s| s.allowed.is_some()) => {
                        let error = "the model gave none of the tokens that the form allows a finite logit";
                        effects.push(self.unformed(row.seq, row.end(), error.into()));
                    }
                    RowResult::NotFinite => effects.push(self.fail(row, None)),
                    RowResult::Failed(error) => effects.push(self.fail(row, Some(error))),
                }
            }
        }
        self.spare.recycle(plan);
    }

    fn take_output(&mut self, row: &PlanRow, output: RowOutput, effects: &mut Vec<Effect>) {
        let id = row.seq;
        let seq = self.seqs.get_mut(&id).expect("resolve looked it up");
        if !output.prompt_logprobs.is_empty() {
            seq.num_scored = row.score_at.end;
            effects.push(Effect::PromptLogprobs { seq: id, logprobs: output.prompt_logprobs });
        }
        if seq.pooler.is_some() {
            effects.extend(self.pool(row, &output.states));
            return self.settle_unread(id);
        }
        if !seq.held.is_empty() && seq.has_prompt() {
            let held = std::mem::take(&mut seq.held);
            self.pass_prompt_on(held, true);
        }
        match output.sampled {
            Some(token) => self.advance(row, token, output.logprobs, effects),
            None if row.sample.is_some() => {
                effects.push(self.fail(row, Some("no token was sampled".into())));
            }
            None => {}
        }
        self.settle_unread(id);
    }

    /// Takes hidden states in. With the end of its prompt a sequence has given what it was for.
    fn pool(&mut self, row: &PlanRow, states: &[f32]) -> Option<Effect> {
        let seq = self.seqs.get_mut(&row.seq).expect("resolve looked it up");
        let pooler = seq.pooler.as_mut().expect("asked by the caller");
        let is_over = row.end() == seq.prompt_len;
        if !pooler.add(row.pool_at.clone(), states) || (is_over && !pooler.is_complete()) {
            return Some(self.fail(row, Some("the hidden states are not those that were asked for".into())));
        }
        if !is_over {
            return None;
        }
        let (values, num_preemptions) = (pooler.pooled(), seq.num_preemptions);
        self.remove(row.seq);
        Some(Effect::Embedding { seq: row.seq, values, num_preemptions })
    }

    /// Takes a chosen token in, and what its constraint made of it.
    fn advance(
        &mut self,
        row: &PlanRow,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
        effects: &mut Vec<Effect>,
    ) {
        let seq = self.seqs.get_mut(&row.seq).expect("resolve looked it up");
        seq.newest = seq.tokens.len();
        if !self.take_token(row.seq, token, logprobs, effects) {
            self.apply_form(row, effects);
        }
    }

    /// Appends a token to a sequence, and takes the sequence out when that ends it. True when it did.
    pub(super) fn take_token(
        &mut self,
        id: SeqId,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let seq = self.seqs.get_mut(&id).expect("its caller looked it up");
        seq.push(token);
        self.waiting.charge(&seq.turn.tenant, 0, 1);
        let num_preemptions = seq.num_preemptions;
        let number = seq.completion_tokens();
        // Whether a constrained sequence that is full is complete is its constraint's to say.
        let is_full = number >= seq.sampling.max_tokens && seq.form.is_none();
        let length = || is_full.then_some((FinishReason::Length, None));
        let finish = seq.stop_at(token, number).or_else(length);
        let is_last = finish.is_some();
        if is_last {
            self.remove(id);
        }
        effects.push(Effect::Token { seq: id, token, logprobs, finish, num_preemptions });
        is_last
    }

    fn fail(&mut self, row: &PlanRow, error: Option<String>) -> Effect {
        self.remove(row.seq);
        Effect::Failed { seq: row.seq, position: row.end(), error }
    }
}
