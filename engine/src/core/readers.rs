//! Readers that do not keep up: their requests are parked, and nobody else notices.

use std::time::{Duration, Instant};

use super::Core;
use crate::{error::RequestError, ids::Ticket};

impl Core {
    /// Parks a request whose stream holds as much as it may. Tokens of steps in flight still come.
    pub(super) fn park(&mut self, ticket: Ticket, now: Instant) {
        for seq in self.ledger.live_seqs(ticket) {
            self.scheduler.park(seq);
        }
        let until = now.checked_add(self.settings.slow_reader_timeout);
        self.counters.parked += u64::from(self.ledger.park(ticket, now, until));
    }

    /// Lets a parked request go on. Without effect on one that is gone, runs, or is behind again: its reader will say so once more.
    pub(super) fn resume(&mut self, ticket: Ticket, now: Instant) {
        if self.ledger.unpark(ticket, now) {
            for seq in self.ledger.live_seqs(ticket) {
                self.scheduler.unpark(seq);
            }
        }
    }

    /// Ends a request that was parked for too long, unless word that it can go on is under way.
    pub(super) fn give_up_on_reader(&mut self, ticket: Ticket, now: Instant) {
        self.resume(ticket, now);
        if let Some(since) = self.ledger.parked_since(ticket) {
            let unread: Duration = now.saturating_duration_since(since);
            self.fail(ticket, RequestError::SlowReader { unread }, now);
            self.counters.failed += 1;
        }
    }
}
