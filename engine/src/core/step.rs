//! A step: planned, launched, and its results taken in.

use std::time::Instant;

use super::{Core, Flow};
use crate::{
    error::{RequestError, StopReason},
    explain::Life,
    ids::SeqId,
    ledger::{Delivered, Delivery, Embedded},
    output::FinishReason,
    runner::Finished,
    scheduler::{Effect, Note, RowResult, StepOutput, StepPlan},
};

/// A step that was launched and is not resolved.
#[derive(Debug, Clone, Copy)]
pub(super) struct InFlight {
    launched: Instant,
    /// The first rows of the plan, which generate; the others read prompts.
    decode_rows: usize,
    prefill_tokens: usize,
}

impl Core {
    /// Plans and launches a step. False when there is nothing to run for now.
    pub(super) fn launch(&mut self) -> bool {
        let start = Instant::now();
        let mut decode_rows = 0;
        let plan = self.scheduler.plan(|rows| {
            decode_rows = rows;
            self.pacer.prefill_budget(rows)
        });
        let now = Instant::now();
        self.take_notes(now);
        if plan.rows.is_empty() {
            return false;
        }
        let tokens = plan.num_tokens();
        let histograms = &mut self.ledger.histograms;
        histograms.step_plan.record_duration(now.saturating_duration_since(start));
        histograms.iteration_tokens.record(tokens as f64);
        self.counters.blocks_saved += plan.saves.len() as u64;
        self.counters.blocks_loaded += plan.loads.len() as u64;
        self.in_flight.push_back(InFlight {
            launched: now,
            decode_rows,
            prefill_tokens: tokens - decode_rows,
        });
        self.stats.beat();
        self.said_no_more = false;
        self.runner.launch(plan);
        true
    }

    /// What the plan did to sequences besides giving them rows.
    fn take_notes(&mut self, now: Instant) {
        let mut notes = std::mem::take(&mut self.notes);
        self.scheduler.take_notes(&mut notes);
        let mut admitted = 0;
        for note in notes.drain(..) {
            match note {
                Note::Admitted { seq, cached_tokens, looked_up, resumed: false } => {
                    admitted += 1;
                    if self.ledger.admitted(seq, cached_tokens, now) {
                        self.counters.prefix_cache_queries += looked_up as u64;
                        self.counters.prefix_cache_hits += cached_tokens as u64;
                    }
                }
                Note::Admitted { seq, cached_tokens, .. } => {
                    self.ledger.note(seq, Life::Resumed { cached_tokens }, now);
                }
                Note::Preempted { seq } => self.ledger.note(seq, Life::Preempted, now),
                // Said for the whole request when it was decided.
                Note::Parked { .. } => {}
            }
        }
        self.notes = notes;
        self.admission.planned(admitted, self.scheduler.num_waiting(), now);
    }

    pub(super) fn take(&mut self, finished: Finished) -> Flow {
        match finished {
            Ok((plan, output)) => {
                self.stats.beat();
                self.said_no_more = false;
                let now = Instant::now();
                let decode_rows = self.measure(now);
                self.note_chunks(&plan, &output, decode_rows, now);
                self.resolve(plan, output, now);
                self.ledger.histograms.step_resolve.record_duration(now.elapsed());
                Flow::Continue
            }
            Err(lost) => Flow::Stop(StopReason::DeviceLost(lost.to_string())),
        }
    }

    /// Learns from the oldest step in flight, which is done. Returns its rows that generated.
    fn measure(&mut self, now: Instant) -> usize {
        let step = self.in_flight.pop_front().expect("results come for what was launched");
        // The device began with it when it had it, and was done with the one before.
        let begun = self.last_done.map_or(step.launched, |done| done.max(step.launched));
        let busy = now.saturating_duration_since(begun);
        self.last_done = Some(now);
        self.ledger.histograms.step_execute.record_duration(busy);
        self.pacer.observe(step.decode_rows, step.prefill_tokens, busy);
        step.decode_rows
    }

    /// Puts the parts of prompts that a step has read into the lives of their requests.
    fn note_chunks(&mut self, plan: &StepPlan, output: &StepOutput, decode_rows: usize, now: Instant) {
        for (row, result) in plan.rows.iter().zip(&output.rows).skip(decode_rows) {
            if matches!(result, RowResult::Done(_)) {
                let chunk = Life::Chunk { tokens: row.input.num_tokens(), computed: row.end() };
                self.ledger.note(row.seq, chunk, now);
            }
        }
    }

    fn resolve(&mut self, plan: StepPlan, output: StepOutput, now: Instant) {
        let mut effects = std::mem::take(&mut self.effects);
        self.scheduler.resolve(plan, output, &mut effects);
        self.counters.steps += 1;
        for effect in effects.drain(..) {
            self.commit(effect, now);
        }
        self.effects = effects;
        if cfg!(debug_assertions) {
            self.scheduler.check();
        }
    }

    fn commit(&mut self, effect: Effect, now: Instant) {
        match effect {
            Effect::PromptLogprobs { seq, logprobs } => self.ledger.prompt_logprobs(seq, logprobs),
            Effect::Token { seq, token, logprobs, finish, num_preemptions } => {
                self.counters.generation_tokens += 1;
                let by_length = matches!(finish, Some((FinishReason::Length, _)));
                let delivery = Delivery { seq, token, logprobs, finish, num_preemptions };
                match self.ledger.token(delivery, now) {
                    Delivered::Open => {}
                    Delivered::Unread(ticket) => self.park(ticket, now),
                    Delivered::Over => {
                        self.counters.finished += 1;
                        self.counters.finished_by_length += u64::from(by_length);
                    }
                }
            }
            Effect::Embedding { seq, values, num_preemptions } => {
                let over = self.ledger.embedding(Embedded { seq, values, num_preemptions }, now);
                self.counters.finished += u64::from(over);
            }
            Effect::Complete { seq } => {
                self.counters.finished += u64::from(self.ledger.finish_seq(seq, FinishReason::Stop, now));
            }
            Effect::Unformed { seq, position, error } => {
                if let Some(ticket) = self.ledger.ticket_of(seq) {
                    self.counters.failed += 1;
                    self.fail(ticket, RequestError::Unformed { position, detail: error }, now);
                }
            }
            Effect::Failed { seq, position, error } => self.fail_seq(seq, position, error, now),
        }
    }

    /// A sequence that cannot go on takes its request along.
    fn fail_seq(&mut self, seq: SeqId, position: usize, error: Option<String>, now: Instant) {
        let Some(ticket) = self.ledger.ticket_of(seq) else { return };
        self.counters.failed += 1;
        let error = match error {
            None => RequestError::NotFinite { position },
            Some(detail) => {
                tracing::error!(detail, position, "a request failed in the runner");
                RequestError::Internal("the model failed on this request; see the server's log".into())
            }
        };
        self.fail(ticket, error, now);
    }
}
