//! The ledger: every accepted request ends exactly once.
//!
//! A request is opened when the engine accepts it and closed when its last completion ends, when it fails, or when someone aborts it.
//! Closing consumes the entry, so nothing can be sent after the end; an entry that is dropped without being closed (the
//! engine died) tells its client so. This is the only place that sends to clients.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    time::{Duration, Instant},
};

use async_channel::Sender;

use crate::{
    error::RequestError,
    event::Event,
    ids::{RequestId, SeqId, Ticket, TokenId},
    output::{Finish, FinishReason, MatchedStop, TokenLogprobs, Usage},
    queue::QueueSlot,
};

/// Ended requests that are remembered, so that a late abort can be answered with "finished".
const REMEMBERED: usize = 4096;

/// One completion of an open request.
#[derive(Debug)]
struct Completion {
    /// `None` once it has ended.
    seq: Option<SeqId>,
    tokens: usize,
    first_token: Option<Instant>,
    num_preemptions: usize,
}

/// An open request.
#[derive(Debug)]
struct Entry {
    id: RequestId,
    events: Sender<Event>,
    completions: Vec<Completion>,
    prompt_tokens: usize,
    submitted: Instant,
    first_scheduled: Option<Instant>,
    deadline: Option<Instant>,
    /// Given back when the request first gets a row of the batch.
    slot: Option<QueueSlot>,
    closed: bool,
}

impl Entry {
    /// The receiver may be gone: its request is about to be aborted, and nothing is lost.
    fn send(&self, event: Event) {
        drop(self.events.try_send(event));
    }

    fn usage(&self, index: usize) -> Usage {
        let completion = &self.completions[index];
        let since_submission = |at: Option<Instant>| at.map_or(Duration::ZERO, |at| at - self.submitted);
        Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: 0,
            completion_tokens: completion.tokens,
            queue_time: since_submission(self.first_scheduled),
            time_to_first_token: since_submission(completion.first_token),
            num_preemptions: completion.num_preemptions,
        }
    }

    fn completion_tokens(&self) -> usize {
        self.completions.iter().map(|completion| completion.tokens).sum()
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if !self.closed {
            self.send(Event::Failed(RequestError::EngineStopped("it failed while the request ran".into())));
        }
    }
}

/// A request to be opened.
pub(crate) struct Opening {
    pub ticket: Ticket,
    pub id: RequestId,
    pub events: Sender<Event>,
    /// One per completion.
    pub seqs: Vec<SeqId>,
    pub prompt_tokens: usize,
    pub submitted: Instant,
    pub deadline: Option<Instant>,
    pub slot: QueueSlot,
}

/// All open requests.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    open: HashMap<Ticket, Entry>,
    by_id: HashMap<RequestId, Ticket>,
    by_seq: HashMap<SeqId, (Ticket, usize)>,
    deadlines: BTreeSet<(Instant, Ticket)>,
    /// Ended requests with the tokens they had produced, oldest first.
    ended: VecDeque<(RequestId, usize)>,
}

impl Ledger {
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub(crate) fn num_open(&self) -> usize {
        self.open.len()
    }

    pub(crate) fn tickets(&self) -> Vec<Ticket> {
        self.open.keys().copied().collect()
    }

    /// The open request of this name.
    pub(crate) fn find(&self, id: &RequestId) -> Option<Ticket> {
        self.by_id.get(id).copied()
    }

    /// Tokens that an ended request had produced, if it is remembered.
    pub(crate) fn ended(&self, id: &RequestId) -> Option<usize> {
        self.ended.iter().rev().find(|(ended, _)| ended == id).map(|&(_, tokens)| tokens)
    }

    /// Opens a request. The caller made sure that its id is not open.
    pub(crate) fn open(&mut self, opening: Opening) {
        let Opening { ticket, id, events, seqs, prompt_tokens, submitted, deadline, slot } = opening;
        self.by_seq.extend(seqs.iter().enumerate().map(|(index, &seq)| (seq, (ticket, index))));
        self.by_id.insert(id.clone(), ticket);
        if let Some(deadline) = deadline {
            self.deadlines.insert((deadline, ticket));
        }
        let completion =
            |seq| Completion { seq: Some(seq), tokens: 0, first_token: None, num_preemptions: 0 };
        let completions = seqs.into_iter().map(completion).collect();
        let entry = Entry {
            id,
            events,
            completions,
            prompt_tokens,
            submitted,
            first_scheduled: None,
            deadline,
            slot: Some(slot),
            closed: false,
        };
        self.open.insert(ticket, entry);
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

    /// Notes that a sequence is part of a step: its request does not queue any more.
    pub(crate) fn scheduled(&mut self, seq: SeqId, now: Instant) {
        if let Some((ticket, _)) = self.by_seq.get(&seq)
            && let Some(entry) = self.open.get_mut(ticket)
            && entry.first_scheduled.is_none()
        {
            entry.first_scheduled = Some(now);
            entry.slot = None;
        }
    }

    pub(crate) fn prompt_logprobs(&self, seq: SeqId, logprobs: Vec<TokenLogprobs>) {
        if let Some(entry) = self.by_seq.get(&seq).and_then(|(ticket, _)| self.open.get(ticket)) {
            entry.send(Event::PromptLogprobs(logprobs));
        }
    }

    /// Delivers a token, and ends its completion when it is the last. True when that ended the request.
    pub(crate) fn token(&mut self, token: Delivery, now: Instant) -> bool {
        let Some(&(ticket, index)) = self.by_seq.get(&token.seq) else { return false };
        let Some(entry) = self.open.get_mut(&ticket) else { return false };
        let completion = &mut entry.completions[index];
        completion.tokens += 1;
        completion.first_token.get_or_insert(now);
        completion.num_preemptions = token.num_preemptions;
        let finish = token.finish.map(|(reason, matched_stop)| Finish {
            reason,
            matched_stop,
            usage: entry.usage(index),
        });
        let ended = finish.is_some();
        entry.send(Event::Token {
            index: index as u32,
            token: token.token,
            logprobs: token.logprobs,
            finish,
        });
        ended && self.end_completion(ticket, index)
    }

    /// Ends one completion without a new token. True when that ended the request.
    pub(crate) fn finish(&mut self, ticket: Ticket, index: u32, reason: FinishReason) -> bool {
        let Some(entry) = self.open.get(&ticket) else { return false };
        let index = index as usize;
        if entry.completions.get(index).is_none_or(|completion| completion.seq.is_none()) {
            return false;
        }
        let finish = Finish { reason, matched_stop: None, usage: entry.usage(index) };
        entry.send(Event::Finished { index: index as u32, finish });
        self.end_completion(ticket, index)
    }

    /// Ends every completion that is left, and so the request.
    pub(crate) fn finish_all(&mut self, ticket: Ticket, reason: FinishReason) {
        let completions = self.open.get(&ticket).map_or(0, |entry| entry.completions.len());
        for index in 0..completions as u32 {
            self.finish(ticket, index, reason);
        }
    }

    /// Closes a request that nobody listens to any more. False when it was closed before.
    pub(crate) fn discard(&mut self, ticket: Ticket) -> bool {
        let open = self.open.contains_key(&ticket);
        self.close(ticket);
        open
    }

    /// Ends a request in an error.
    pub(crate) fn fail(&mut self, ticket: Ticket, error: RequestError) {
        if let Some(entry) = self.open.get(&ticket) {
            entry.send(Event::Failed(error));
            self.close(ticket);
        }
    }

    /// The request of a sequence.
    pub(crate) fn ticket_of(&self, seq: SeqId) -> Option<Ticket> {
        self.by_seq.get(&seq).map(|&(ticket, _)| ticket)
    }

    /// Tokens that an open request has produced.
    pub(crate) fn completion_tokens(&self, ticket: Ticket) -> usize {
        self.open.get(&ticket).map_or(0, Entry::completion_tokens)
    }

    /// Open requests whose deadline has passed.
    pub(crate) fn expired(&self, now: Instant) -> Vec<Ticket> {
        self.deadlines.iter().take_while(|(at, _)| *at <= now).map(|&(_, ticket)| ticket).collect()
    }

    /// The next deadline of an open request.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(at, _)| at)
    }

    fn end_completion(&mut self, ticket: Ticket, index: usize) -> bool {
        let Some(entry) = self.open.get_mut(&ticket) else { return false };
        if let Some(seq) = entry.completions[index].seq.take() {
            self.by_seq.remove(&seq);
        }
        let over = entry.completions.iter().all(|completion| completion.seq.is_none());
        if over {
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
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, ticket));
        }
        if self.ended.len() == REMEMBERED {
            self.ended.pop_front();
        }
        self.ended.push_back((entry.id.clone(), entry.completion_tokens()));
    }
}

/// A token to be delivered.
pub(crate) struct Delivery {
    pub seq: SeqId,
    pub token: TokenId,
    pub logprobs: Option<TokenLogprobs>,
    pub finish: Option<(FinishReason, Option<MatchedStop>)>,
    pub num_preemptions: usize,
}
