//! The ledger: every accepted request ends exactly once.
//!
//! A request is opened when the engine accepts it and closed when its last completion ends, when it fails, or when someone aborts it.
//! Closing consumes the entry, so nothing can be sent after the end; an entry that is dropped without being closed (the
//! engine died) tells its client so. This is the only place that sends to clients. What time does to a request
//! ([`Timer`]) and what happened to it ([`LifeLog`](crate::life::LifeLog)) is kept with it.

mod entry;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use entry::Entry;
pub(crate) use entry::{Delivered, Delivery, Embedded, Opening, Timer};

use crate::{
    ended::Ended,
    error::RequestError,
    event::Event,
    explain::{EndedLife, Explanation, Life, RequestState},
    ids::{RequestId, SeqId, Ticket},
    output::{Finish, FinishReason, TokenLogprobs},
    stats::Histograms,
};

/// All open requests.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    open: HashMap<Ticket, Entry>,
    by_id: HashMap<RequestId, Ticket>,
    by_seq: HashMap<SeqId, (Ticket, usize)>,
    timers: BTreeSet<(Instant, Ticket, Timer)>,
    ended: Ended,
    /// Distributions over requests, measured here; whoever runs the steps adds its own.
    pub(crate) histograms: Histograms,
}

impl Ledger {
    /// An empty ledger that hands the lives of ended requests to `sink`.
    pub(crate) fn new(sink: Option<async_channel::Sender<EndedLife>>) -> Self {
        Self { ended: Ended::new(sink), ..Self::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub(crate) fn num_open(&self) -> usize {
        self.open.len()
    }

    /// All open requests in order of submission.
    pub(crate) fn tickets(&self) -> Vec<Ticket> {
        let mut tickets: Vec<_> = self.open.keys().copied().collect();
        tickets.sort_unstable();
        tickets
    }

    /// The open request of this name.
    pub(crate) fn find(&self, id: &RequestId) -> Option<Ticket> {
        self.by_id.get(id).copied()
    }

    /// The name of an open request.
    pub(crate) fn id(&self, ticket: Ticket) -> Option<&RequestId> {
        self.open.get(&ticket).map(|entry| &entry.id)
    }

    /// Tokens that an ended request had produced, if it is remembered.
    pub(crate) fn ended(&self, id: &RequestId) -> Option<usize> {
        self.ended.completion_tokens(id)
    }

    /// Lives that found no room on their way to whoever keeps records.
    pub(crate) fn lives_lost(&self) -> u64 {
        self.ended.lost()
    }

    /// What is known of a request by itself, and its live sequences; `None` when it is not remembered.
    pub(crate) fn explain(&self, id: &RequestId) -> Option<(Explanation, Vec<SeqId>)> {
        match self.find(id) {
            Some(ticket) => {
                let entry = self.open.get(&ticket)?;
                let state = if entry.parked.is_some() { RequestState::Parked } else { RequestState::Queued };
                Some((entry.explanation(state), self.live_seqs(ticket)))
            }
            None => Some((self.ended.life(id)?.clone(), Vec::new())),
        }
    }

    /// Opens a request. The caller made sure that its id is not open.
    pub(crate) fn open(&mut self, opening: Opening, now: Instant) {
        let (ticket, timers) = (opening.ticket, [opening.deadline, opening.queue_limit]);
        self.by_seq.extend(opening.seqs.iter().enumerate().map(|(index, &seq)| (seq, (ticket, index))));
        self.by_id.insert(opening.id.clone(), ticket);
        self.open.insert(ticket, Entry::new(opening, now));
        self.set_timer(ticket, Timer::Deadline, timers[0]);
        self.set_timer(ticket, Timer::Queue, timers[1]);
    }

    /// Sequences of a request that have not ended.
    pub(crate) fn live_seqs(&self, ticket: Ticket) -> Vec<SeqId> {
        let entry = self.open.get(&ticket);
        entry.map_or(Vec::new(), |entry| entry.completions.iter().filter_map(|c| c.seq).collect())
    }

    /// The sequence of one completion, if it has not ended.
    pub(crate) fn seq(&self, ticket: Ticket, index: u32) -> Option<SeqId> {
        self.open.get(&ticket)?.completions.get(index as usize)?.seq
    }

    /// Takes note of what happened to a sequence.
    pub(crate) fn note(&mut self, seq: SeqId, what: Life, now: Instant) {
        if let Some(&(ticket, index)) = self.by_seq.get(&seq)
            && let Some(entry) = self.open.get_mut(&ticket)
        {
            entry.life.push(index, what, now);
        }
    }

    /// Notes that a sequence got its first row, with so many tokens of its prompt from the prefix cache: its request does not queue any
    /// more. True when it is the first sequence of its request.
    pub(crate) fn admitted(&mut self, seq: SeqId, cached_tokens: usize, now: Instant) -> bool {
        self.note(seq, Life::Admitted { cached_tokens }, now);
        let Some(&(ticket, _)) = self.by_seq.get(&seq) else { return false };
        let Some(entry) = self.open.get_mut(&ticket).filter(|entry| entry.first_scheduled.is_none()) else {
            return false;
        };
        entry.first_scheduled = Some(now);
        entry.cached_tokens = cached_tokens;
        entry.slot = None;
        self.histograms.request_queue_time.record_duration(entry.since_submission(Some(now)));
        self.set_timer(ticket, Timer::Queue, None);
        true
    }

    pub(crate) fn prompt_logprobs(&self, seq: SeqId, logprobs: Vec<TokenLogprobs>) {
        if let Some(entry) = self.by_seq.get(&seq).and_then(|(ticket, _)| self.open.get(ticket)) {
            entry.send(Event::PromptLogprobs(logprobs));
        }
    }

    /// Delivers a token, and ends its completion when it is the last.
    pub(crate) fn token(&mut self, token: Delivery, now: Instant) -> Delivered {
        let Some(&(ticket, index)) = self.by_seq.get(&token.seq) else { return Delivered::Open };
        let Some(entry) = self.open.get_mut(&ticket) else { return Delivered::Open };
        if entry.first_token().is_none() {
            self.histograms.time_to_first_token.record_duration(entry.since_submission(Some(now)));
            let prefill =
                entry.first_scheduled.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
            self.histograms.request_prefill_time.record_duration(prefill);
        }
        let completion = &mut entry.completions[index];
        // Tokens that come at once have no time between them.
        if let Some(last) = completion.last_token.replace(now).filter(|&last| last < now) {
            self.histograms.inter_token_latency.record_duration(now.saturating_duration_since(last));
        }
        if completion.first_token.is_none() {
            completion.first_token = Some(now);
            entry.life.push(index, Life::FirstToken, now);
        }
        completion.tokens += 1;
        completion.num_preemptions = token.num_preemptions;
        let finish = token.finish.map(|(reason, matched_stop)| Finish {
            reason,
            matched_stop,
            usage: entry.usage(index),
        });
        let ended = finish.as_ref().map(|finish| finish.reason);
        // Counted before it can be taken.
        let is_unread = entry.unread.sent();
        entry.send(Event::Token {
            index: index as u32,
            token: token.token,
            logprobs: token.logprobs,
            finish,
        });
        match ended {
            Some(reason) if self.end_completion(ticket, index, reason, now) => Delivered::Over,
            _ if is_unread => Delivered::Unread(ticket),
            _ => Delivered::Open,
        }
    }

    /// Delivers the embedding of a sequence that was to give one. True when that ended the request, which was open.
    pub(crate) fn embedding(&mut self, embedding: Embedded, now: Instant) -> bool {
        let Embedded { seq, values, num_preemptions } = embedding;
        let Some(&(ticket, index)) = self.by_seq.get(&seq) else { return false };
        let Some(entry) = self.open.get_mut(&ticket) else { return false };
        let prefill = entry.first_scheduled.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.histograms.request_prefill_time.record_duration(prefill);
        entry.completions[index].num_preemptions = num_preemptions;
        entry.send(Event::Embedding { values, usage: entry.usage(index) });
        self.end_completion(ticket, index, FinishReason::Stop, now)
    }

    /// Ends one completion without a new token. True when that ended the request.
    pub(crate) fn finish(
        &mut self,
        (ticket, index): (Ticket, u32),
        reason: FinishReason,
        now: Instant,
    ) -> bool {
        let Some(entry) = self.open.get_mut(&ticket) else { return false };
        let at = index as usize;
        if entry.completions.get(at).is_none_or(|completion| completion.seq.is_none()) {
            return false;
        }
        let finish = Finish { reason, matched_stop: None, usage: entry.usage(at) };
        // Whoever hears of the end finds the place in the queue free.
        entry.slot = None;
        entry.send(Event::Finished { index, finish });
        self.end_completion(ticket, at, reason, now)
    }

    /// Ends a sequence's completion without a new token. True when that ended the request.
    pub(crate) fn finish_seq(&mut self, seq: SeqId, reason: FinishReason, now: Instant) -> bool {
        let found = self.by_seq.get(&seq).copied();
        found.is_some_and(|(ticket, index)| self.finish((ticket, index as u32), reason, now))
    }

    /// Ends every completion that is left, and so the request, by an abort.
    pub(crate) fn abort(&mut self, ticket: Ticket, now: Instant) {
        let completions = self.open.get(&ticket).map_or(0, |entry| entry.completions.len());
        for index in 0..completions as u32 {
            self.finish((ticket, index), FinishReason::Abort, now);
        }
    }

    /// Closes a request that nobody listens to any more. False when it was closed before.
    pub(crate) fn discard(&mut self, ticket: Ticket, now: Instant) -> bool {
        let Some(entry) = self.open.get_mut(&ticket) else { return false };
        entry.life.push(0, Life::Dropped, now);
        self.close(ticket);
        true
    }

    /// Ends a request in an error.
    pub(crate) fn fail(&mut self, ticket: Ticket, error: RequestError, now: Instant) {
        if let Some(entry) = self.open.get_mut(&ticket) {
            entry.life.push(0, Life::Failed(error.code()), now);
            entry.slot = None;
            entry.send(Event::Failed(error));
            self.close(ticket);
        }
    }

    /// The request of a sequence, and which of its completions it is.
    pub(crate) fn name(&self, seq: SeqId) -> Option<(&RequestId, u32)> {
        let &(ticket, index) = self.by_seq.get(&seq)?;
        Some((self.id(ticket)?, index as u32))
    }

    /// The request of a sequence.
    pub(crate) fn ticket_of(&self, seq: SeqId) -> Option<Ticket> {
        self.by_seq.get(&seq).map(|&(ticket, _)| ticket)
    }

    /// Tokens that an open request has produced.
    pub(crate) fn completion_tokens(&self, ticket: Ticket) -> usize {
        self.open.get(&ticket).map_or(0, Entry::completion_tokens)
    }

    /// How long an open request has been there.
    pub(crate) fn age(&self, ticket: Ticket, now: Instant) -> Duration {
        self.open.get(&ticket).map_or(Duration::ZERO, |entry| entry.since_submission(Some(now)))
    }

    /// Notes that a request is parked, until its client reads or `until`. False when it was before; the wait begins anew then, because its
    /// client has read something.
    pub(crate) fn park(&mut self, ticket: Ticket, now: Instant, until: Option<Instant>) -> bool {
        let Some(entry) = self.open.get_mut(&ticket) else { return false };
        let is_new = entry.parked.replace(now).is_none();
        entry.unread_seen = entry.unread.tokens();
        if is_new {
            entry.life.push(0, Life::Parked, now);
        }
        self.set_timer(ticket, Timer::Reader, until);
        is_new
    }

    /// Notes that a parked request goes on. False when it is not parked, or its reader is behind again.
    pub(crate) fn unpark(&mut self, ticket: Ticket, now: Instant) -> bool {
        let parked = |entry: &&mut Entry| entry.parked.is_some() && !entry.unread.waits();
        let Some(entry) = self.open.get_mut(&ticket).filter(parked) else { return false };
        entry.parked = None;
        entry.life.push(0, Life::Unparked, now);
        // What a client let itself wait for is no latency of ours.
        entry.completions.iter_mut().for_each(|completion| completion.last_token = None);
        self.set_timer(ticket, Timer::Reader, None);
        true
    }

    /// Gives the reader of a parked request until then, if it has read something since this was last asked.
    pub(crate) fn reads_on(&mut self, ticket: Ticket, until: Option<Instant>) -> bool {
        let Some(entry) = self.open.get_mut(&ticket).filter(|entry| entry.parked.is_some()) else {
            return false;
        };
        let unread = entry.unread.tokens();
        let reads = unread < std::mem::replace(&mut entry.unread_seen, unread);
        if reads {
            self.set_timer(ticket, Timer::Reader, until);
        }
        reads
    }

    /// Since when a request is parked.
    pub(crate) fn parked_since(&self, ticket: Ticket) -> Option<Instant> {
        self.open.get(&ticket)?.parked
    }

    /// Open requests whose time has come.
    pub(crate) fn due(&self, now: Instant) -> Vec<(Ticket, Timer)> {
        let due = self.timers.iter().take_while(|(at, ..)| *at <= now);
        due.map(|&(_, ticket, timer)| (ticket, timer)).collect()
    }

    /// When the next time comes.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|&(at, ..)| at)
    }

    fn set_timer(&mut self, ticket: Ticket, timer: Timer, at: Option<Instant>) {
        let Some(entry) = self.open.get_mut(&ticket) else { return };
        if let Some(old) = std::mem::replace(&mut entry.timers[timer as usize], at) {
            self.timers.remove(&(old, ticket, timer));
        }
        self.timers.extend(at.map(|at| (at, ticket, timer)));
    }

    fn end_completion(&mut self, ticket: Ticket, index: usize, reason: FinishReason, now: Instant) -> bool {
        let Some(entry) = self.open.get_mut(&ticket) else { return false };
        if let Some(seq) = entry.completions[index].seq.take() {
            self.by_seq.remove(&seq);
        }
        entry.life.push(index, Life::Finished(reason), now);
        let over = entry.completions.iter().all(|completion| completion.seq.is_none());
        if over {
            if reason != FinishReason::Abort {
                self.histograms.e2e_request_latency.record_duration(entry.since_submission(Some(now)));
                // An embedding has none.
                if let Some(at) = entry.first_token() {
                    self.histograms.request_decode_time.record_duration(now.saturating_duration_since(at));
                }
            }
            self.close(ticket);
        }
        over
    }

    /// The one way out of the ledger.
    fn close(&mut self, ticket: Ticket) {
        let Some(mut entry) = self.open.remove(&ticket) else { return };
        entry.closed = true;
        for seq in entry.completions.iter().filter_map(|c| c.seq) {
            self.by_seq.remove(&seq);
        }
        self.by_id.remove(&entry.id);
        for (timer, at) in [Timer::Deadline, Timer::Queue, Timer::Reader].into_iter().zip(entry.timers) {
            if let Some(at) = at {
                self.timers.remove(&(at, ticket, timer));
            }
        }
        self.ended.push(EndedLife {
            submitted: entry.life.submitted(),
            trace_parent: entry.trace_parent.take(),
            explanation: entry.explanation(RequestState::Ended),
        });
    }
}
