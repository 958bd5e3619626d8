//! A request ends before its time.

use std::time::{Duration, Instant};

use super::Core;
use crate::{
    activity::AbortCause,
    error::RequestError,
    handle::Drained,
    ids::{RequestId, Ticket},
    ledger::Timer,
    output::{AbortReceipt, AbortStage, FinishReason},
    scheduler::{Removed, Stage},
};

impl Core {
    /// Ends a request by its name.
    pub(super) fn abort(&mut self, id: RequestId, received: Instant) -> AbortReceipt {
        if let Some(ticket) = self.ledger.find(&id) {
            return self.abort_open(ticket, id, received);
        }
        let (stage, completion_tokens) = match self.ledger.ended(&id) {
            Some(tokens) => (AbortStage::Finished, tokens),
            None => (AbortStage::Unknown, 0),
        };
        AbortReceipt {
            id,
            stage,
            completion_tokens,
            blocks_freed: 0,
            rows_freed: 0,
            time_to_free: Duration::ZERO,
        }
    }

    /// Ends everything that is open.
    pub(super) fn abort_all(&mut self, received: Instant) -> Vec<AbortReceipt> {
        let open = self.ledger.tickets().into_iter();
        let named: Vec<_> =
            open.filter_map(|ticket| Some((ticket, self.ledger.id(ticket)?.clone()))).collect();
        named.into_iter().map(|(ticket, id)| self.abort_open(ticket, id, received)).collect()
    }

    fn abort_open(&mut self, ticket: Ticket, id: RequestId, received: Instant) -> AbortReceipt {
        let receipt = self.free(ticket, id, received);
        let now = Instant::now();
        self.ledger.abort(ticket, now);
        self.counters.aborted += 1;
        self.past_aborts.push(AbortCause::Called, receipt.clone(), now);
        receipt
    }

    /// Ends a request whose stream was dropped. One that ended before has nothing left to free.
    pub(super) fn discard(&mut self, ticket: Ticket, received: Instant) {
        let Some(id) = self.ledger.id(ticket).cloned() else { return };
        let receipt = self.free(ticket, id, received);
        let now = Instant::now();
        self.counters.aborted += u64::from(self.ledger.discard(ticket, now));
        self.past_aborts.push(AbortCause::Dropped, receipt, now);
    }

    /// Gives everything back that an open request holds.
    fn free(&mut self, ticket: Ticket, id: RequestId, received: Instant) -> AbortReceipt {
        let completion_tokens = self.ledger.completion_tokens(ticket);
        let removed = self.remove_seqs(ticket);
        // The furthest of its completions says where the request was.
        let stage = match removed.iter().map(|r| r.stage).max() {
            Some(Stage::Decode) => AbortStage::Decode,
            Some(Stage::Prefill) => AbortStage::Prefill,
            Some(Stage::Queued) | None => AbortStage::Queued,
        };
        let time_to_free = received.elapsed();
        self.ledger.histograms.abort_to_free.record_duration(time_to_free);
        AbortReceipt {
            id,
            stage,
            completion_tokens,
            blocks_freed: removed.iter().map(|r| r.blocks_freed).sum(),
            rows_freed: removed.iter().map(|r| r.rows_freed).sum(),
            time_to_free,
        }
    }

    /// Ends a completion at a stop string.
    pub(super) fn stop(&mut self, ticket: Ticket, index: u32, now: Instant) {
        if let Some(seq) = self.ledger.seq(ticket, index) {
            self.scheduler.remove(seq);
            let over = self.ledger.finish((ticket, index), FinishReason::Stop, now);
            self.counters.finished += u64::from(over);
        }
    }

    /// Takes a request's sequences out of the scheduler: everything it held is free afterwards.
    fn remove_seqs(&mut self, ticket: Ticket) -> Vec<Removed> {
        self.ledger.live_seqs(ticket).into_iter().filter_map(|seq| self.scheduler.remove(seq)).collect()
    }

    pub(super) fn fail(&mut self, ticket: Ticket, error: RequestError, now: Instant) {
        self.remove_seqs(ticket);
        self.ledger.fail(ticket, error, now);
    }

    /// Ends what has waited too long: requests whose time has come, and whatever is left when a drain's grace is over.
    pub(super) fn expire(&mut self, now: Instant) {
        for (ticket, timer) in self.ledger.due(now) {
            match timer {
                Timer::Deadline => {
                    let completion_tokens = self.ledger.completion_tokens(ticket);
                    self.fail(ticket, RequestError::DeadlineExceeded { completion_tokens }, now);
                    self.counters.failed += 1;
                }
                Timer::Queue => {
                    let (waited, waiting) = (self.ledger.age(ticket, now), self.scheduler.num_waiting());
                    let error = self.admission.waited_too_long(waited, waiting, now);
                    self.fail(ticket, error, now);
                    self.counters.refused += 1;
                }
                Timer::Reader => self.give_up_on_reader(ticket, now),
            }
        }
        self.end_drains(now);
    }

    fn end_drains(&mut self, now: Instant) {
        let over = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let mut cut_off = 0;
        if self.draining.iter().any(|drain| over(drain.deadline)) {
            for ticket in self.ledger.tickets() {
                self.fail(ticket, RequestError::Draining, now);
                self.counters.failed += 1;
                cut_off += 1;
            }
        }
        if self.ledger.is_empty() {
            for drain in self.draining.drain(..) {
                let finished = drain.open_at_start.saturating_sub(cut_off);
                // Whoever asked may have gone.
                let _ = drain.reply.try_send(Drained { finished, cut_off });
            }
        }
    }
}
