//! An open request.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_channel::Sender;

use crate::{
    error::RequestError,
    event::Event,
    explain::{Explanation, RequestState},
    ids::{RequestId, SeqId, TenantId, Ticket, TokenId},
    life::LifeLog,
    output::{FinishReason, MatchedStop, TokenLogprobs, Usage},
    queue::QueueSlot,
    unread::Unread,
};

/// A request to be opened.
pub(crate) struct Opening {
    pub ticket: Ticket,
    pub id: RequestId,
    pub events: Sender<Event>,
    pub unread: Arc<Unread>,
    /// One per completion.
    pub seqs: Vec<SeqId>,
    pub prompt_tokens: usize,
    pub priority: i32,
    pub tenant: TenantId,
    pub trace_parent: Option<Arc<str>>,
    pub submitted: Instant,
    pub deadline: Option<Instant>,
    /// When it has waited long enough for its first row.
    pub queue_limit: Option<Instant>,
    pub slot: QueueSlot,
}

/// A token to be delivered.
pub(crate) struct Delivery {
    pub seq: SeqId,
    pub token: TokenId,
    pub logprobs: Option<TokenLogprobs>,
    pub finish: Option<(FinishReason, Option<MatchedStop>)>,
    pub num_preemptions: usize,
}

/// An embedding to be delivered.
pub(crate) struct Embedded {
    pub seq: SeqId,
    /// `[H]`.
    pub values: Vec<f32>,
    pub num_preemptions: usize,
}

/// What a delivery led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivered {
    /// The request goes on, or was gone before.
    Open,
    /// Too much of the stream is unread: the request is to be parked.
    Unread(Ticket),
    /// The request is over.
    Over,
}

/// One completion of an open request.
#[derive(Debug)]
pub(super) struct Completion {
    /// `None` once it has ended.
    pub seq: Option<SeqId>,
    pub tokens: usize,
    pub first_token: Option<Instant>,
    /// Without a token before it in the same run of steps there is no latency between the two.
    pub last_token: Option<Instant>,
    pub num_preemptions: usize,
}

/// What may end a request, or let it go on, when time has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// Its client stops waiting.
    Deadline,
    /// It has waited long enough for its first row.
    Queue,
    /// Its client has not read for long enough.
    Reader,
}

/// An open request.
#[derive(Debug)]
pub(super) struct Entry {
    pub id: RequestId,
    pub events: Sender<Event>,
    pub unread: Arc<Unread>,
    pub completions: Vec<Completion>,
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache when the first completion was first admitted.
    pub cached_tokens: usize,
    pub priority: i32,
    pub tenant: TenantId,
    pub trace_parent: Option<Arc<str>>,
    pub first_scheduled: Option<Instant>,
    /// Since when its sequences are parked.
    pub parked: Option<Instant>,
    /// Tokens that were unread when its reader was last looked at.
    pub unread_seen: usize,
    /// By [`Timer`].
    pub timers: [Option<Instant>; 3],
    /// Given back when the request first gets a row of the batch.
    pub slot: Option<QueueSlot>,
    pub life: LifeLog,
    pub closed: bool,
}

impl Entry {
    pub fn new(opening: Opening, now: Instant) -> Self {
        let completion = |seq| Completion {
            seq: Some(seq),
            tokens: 0,
            first_token: None,
            last_token: None,
            num_preemptions: 0,
        };
        Self {
            id: opening.id,
            events: opening.events,
            unread: opening.unread,
            completions: opening.seqs.into_iter().map(completion).collect(),
            prompt_tokens: opening.prompt_tokens,
            cached_tokens: 0,
            priority: opening.priority,
            tenant: opening.tenant,
            trace_parent: opening.trace_parent,
            first_scheduled: None,
            parked: None,
            unread_seen: 0,
            timers: [None; 3],
            slot: Some(opening.slot),
            life: LifeLog::new(opening.submitted, now),
            closed: false,
        }
    }

    /// The receiver may be gone: its request is about to be aborted, and nothing is lost.
    pub fn send(&self, event: Event) {
        drop(self.events.try_send(event));
    }

    pub fn usage(&self, index: usize) -> Usage {
        let completion = &self.completions[index];
        Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            completion_tokens: completion.tokens,
            queue_time: self.since_submission(self.first_scheduled),
            time_to_first_token: self.since_submission(completion.first_token),
            num_preemptions: completion.num_preemptions,
        }
    }

    pub fn since_submission(&self, at: Option<Instant>) -> Duration {
        at.map_or(Duration::ZERO, |at| at.saturating_duration_since(self.life.submitted()))
    }

    pub fn completion_tokens(&self) -> usize {
        self.completions.iter().map(|completion| completion.tokens).sum()
    }

    /// When the first of its completions gave its first token.
    pub fn first_token(&self) -> Option<Instant> {
        self.completions.iter().filter_map(|completion| completion.first_token).min()
    }

    /// What the ledger knows of it; the scheduler knows the rest of a request that is live.
    pub fn explanation(&self, state: RequestState) -> Explanation {
        let (life, events_left_out) = self.life.events();
        Explanation {
            id: self.id.clone(),
            state,
            waits_for: None,
            ahead: 0,
            predicted_wait: None,
            priority: self.priority,
            tenant: self.tenant.clone(),
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.completion_tokens(),
            kv_blocks: 0,
            num_preemptions: self.completions.iter().map(|completion| completion.num_preemptions).sum(),
            life,
            events_left_out,
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if !self.closed {
            self.send(Event::Failed(RequestError::EngineStopped("it failed while the request ran".into())));
        }
    }
}
