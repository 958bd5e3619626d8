//! Sequences whose tokens are constrained: what a token that was chosen means for those behind it.

use super::{Effect, PlanRow, RowResult, Scheduler, StepOutput, StepPlan, sequence::Sequence};
use crate::{
    constraint::{Advance, Allowed, Constraint, Turn, advance_all},
    ids::{SeqId, TokenId},
    output::FinishReason,
};

/// A sequence's constraint and what it says of the next token.
#[derive(Debug)]
pub(super) struct Form {
    /// Absent while it takes a token in.
    constraint: Option<Box<dyn Constraint>>,
    pub allowed: Allowed,
    /// What follows from the token that came last, until it is applied.
    advance: Option<Result<Advance, String>>,
}

impl Form {
    pub fn new(constraint: Box<dyn Constraint>) -> Self {
        Self { allowed: constraint.first(), constraint: Some(constraint), advance: None }
    }
}

impl Scheduler {
    /// Tells the constraints of a step's sequences which tokens were chosen. All at once, because what they do takes time.
    pub(super) fn advance_forms(&mut self, plan: &StepPlan, output: &StepOutput) {
        if self.num_formed == 0 {
            return;
        }
        let (mut turns, mut seqs) = (Vec::new(), Vec::new());
        for (row, result) in plan.rows.iter().zip(&output.rows) {
            let RowResult::Done(output) = result else { continue };
            let (Some(token), Some(seq)) = (output.sampled, self.seqs.get_mut(&row.seq)) else { continue };
            if let Some(turn) = seq.turn_of_form(token) {
                turns.push(turn);
                seqs.push(row.seq);
            }
        }
        let advances = advance_all(&mut turns);
        for ((seq, turn), advance) in seqs.iter().zip(turns).zip(advances) {
            if let Some(form) = self.seqs.get_mut(seq).and_then(|seq| seq.form.as_mut()) {
                form.constraint = Some(turn.constraint);
                form.advance = Some(advance);
            }
        }
    }

    /// Applies what follows from the newest token of a constrained sequence, which is in its place already and did not end it.
    pub(super) fn apply_form(&mut self, row: &PlanRow, effects: &mut Vec<Effect>) {
        let id = row.seq;
        let Some(form) = self.seqs.get_mut(&id).and_then(|seq| seq.form.as_mut()) else { return };
        let advance = match form.advance.take() {
            Some(Ok(advance)) => advance,
            Some(Err(error)) => return effects.push(self.unformed(id, row.end() + 1, error)),
            None => return,
        };
        for &token in &advance.forced {
            if self.take_token(id, token, None, effects) {
                return;
            }
        }
        let Some(allowed) = advance.then else {
            self.remove(id);
            return effects.push(Effect::Complete { seq: id });
        };
        let seq = self.seqs.get_mut(&id).expect("no token ended it");
        debug_assert!(
            seq.num_sampling() == 0 || allowed.is_free_behind(seq.num_sampling() - 1),
            "what is being sampled was free when it was planned"
        );
        if let Some(form) = seq.form.as_mut() {
            form.allowed = allowed;
        }
        self.end_at_length(id, effects);
    }

    /// Ends a constrained sequence that has all its tokens. Only now is it known that its text is not complete.
    fn end_at_length(&mut self, id: SeqId, effects: &mut [Effect]) {
        let seq = &self.seqs[&id];
        if seq.completion_tokens() < seq.sampling.max_tokens {
            return;
        }
        if let Some(Effect::Token { finish, .. }) = effects.last_mut() {
            *finish = Some((FinishReason::Length, None));
        }
        self.remove(id);
    }

    /// The end of a sequence that cannot keep its form.
    pub(super) fn unformed(&mut self, seq: SeqId, position: usize, error: String) -> Effect {
        self.remove(seq);
        Effect::Unformed { seq, position, error }
    }
}

impl Sequence {
    /// Lets the sequence's constraint take a token in, unless that token ends the sequence anyway.
    fn turn_of_form(&mut self, token: TokenId) -> Option<Turn> {
        let number = self.completion_tokens() + 1;
        if self.stop_at(token, number).is_some() {
            return None;
        }
        let room = self.sampling.max_tokens - number;
        let constraint = self.form.as_mut()?.constraint.take()?;
        Some(Turn { constraint, token, room })
    }
}
