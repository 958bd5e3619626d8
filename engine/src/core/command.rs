//! What handles ask of the engine thread.

use std::{sync::Arc, time::Instant};

use super::{Core, Flow};
use crate::{
    activity::Activity,
    error::RequestError,
    event::Event,
    explain::Explanation,
    handle::{Drained, KvWatch},
    ids::{RequestId, Ticket},
    output::AbortReceipt,
    queue::QueueSlot,
    request::ValidatedRequest,
    unread::Unread,
};

/// A request on its way into the engine.
#[derive(Debug)]
pub(crate) struct Submission {
    pub ticket: Ticket,
    pub request: ValidatedRequest,
    pub events: async_channel::Sender<Event>,
    pub unread: Arc<Unread>,
    pub slot: QueueSlot,
    pub submitted: Instant,
}

#[derive(Debug)]
pub(crate) enum Command {
    Submit(Box<Submission>),
    /// By the client's id; answered with a receipt.
    Abort {
        id: RequestId,
        received: Instant,
        reply: async_channel::Sender<AbortReceipt>,
    },
    /// Everything that is open; answered with a receipt for each.
    AbortAll {
        received: Instant,
        reply: async_channel::Sender<Vec<AbortReceipt>>,
    },
    /// The stream of this submission was dropped.
    Drop {
        ticket: Ticket,
        received: Instant,
    },
    /// A stop string ended this completion.
    Stop {
        ticket: Ticket,
        index: u32,
    },
    /// The reader of a stream that was parked has caught up.
    Resume {
        ticket: Ticket,
    },
    Drain {
        deadline: Option<Instant>,
        reply: async_channel::Sender<Drained>,
    },
    /// Answered with nothing when nobody remembers the request.
    Explain {
        id: RequestId,
        reply: async_channel::Sender<Option<Explanation>>,
    },
    /// How things stand.
    Activity {
        reply: async_channel::Sender<Activity>,
    },
    WatchKv {
        reply: async_channel::Sender<Result<KvWatch, RequestError>>,
    },
    /// Answered with the number of blocks that became free.
    ResetPrefixCache {
        reply: async_channel::Sender<usize>,
    },
    Shutdown,
}

/// A drain under way.
#[derive(Debug)]
pub(super) struct Draining {
    pub deadline: Option<Instant>,
    pub open_at_start: usize,
    pub reply: async_channel::Sender<Drained>,
}

/// An answer that is ready.
#[derive(Debug)]
pub(super) enum Answer {
    Abort(async_channel::Sender<AbortReceipt>, AbortReceipt),
    AbortAll(async_channel::Sender<Vec<AbortReceipt>>, Vec<AbortReceipt>),
}

impl Answer {
    /// Whoever asked may have gone; what was done stands.
    fn send(self) {
        match self {
            Self::Abort(reply, receipt) => drop(reply.try_send(receipt)),
            Self::AbortAll(reply, receipts) => drop(reply.try_send(receipts)),
        }
    }
}

impl Core {
    /// Handles a command and those that queue behind it: requests that arrive together start in one step, and a storm of aborts is
    /// published once.
    pub(super) fn handle_all(&mut self, first: Command) -> Flow {
        let mut flow = self.handle(first);
        for _ in 0..self.commands.len() {
            match (&flow, self.commands.try_recv()) {
                (Flow::Continue, Ok(command)) => flow = self.handle(command),
                _ => break,
            }
        }
        if !self.answers.is_empty() {
            // Whoever reads the statistics after the answer finds it in them.
            self.publish();
            self.answers.drain(..).for_each(Answer::send);
        }
        flow
    }

    fn handle(&mut self, command: Command) -> Flow {
        let now = Instant::now();
        match command {
            Command::Submit(submission) => self.submit(*submission, now),
            Command::Abort { id, received, reply } => {
                let receipt = self.abort(id, received);
                self.answers.push(Answer::Abort(reply, receipt));
            }
            Command::AbortAll { received, reply } => {
                let receipts = self.abort_all(received);
                self.answers.push(Answer::AbortAll(reply, receipts));
            }
            Command::Drop { ticket, received } => self.discard(ticket, received),
            Command::Stop { ticket, index } => self.stop(ticket, index, now),
            Command::Resume { ticket } => self.resume(ticket, now),
            Command::Drain { deadline, reply } => {
                self.stats.set_draining();
                self.draining.push(Draining { deadline, open_at_start: self.ledger.num_open(), reply });
            }
            Command::Explain { id, reply } => drop(reply.try_send(self.explain(&id, now))),
            Command::Activity { reply } => drop(reply.try_send(self.activity(now))),
            Command::WatchKv { reply } => drop(reply.try_send(self.watch_kv())),
            Command::ResetPrefixCache { reply } => {
                let _ = reply.try_send(self.pool.clear_cache());
            }
            Command::Shutdown => return Flow::stop("it was shut down"),
        }
        Flow::Continue
    }
}
