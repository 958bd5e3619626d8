//! Why a request waits, and its life so far.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    error::ErrorCode,
    ids::{RequestId, TenantId},
    output::FinishReason,
    scheduler::WaitReason,
};

/// What the engine knows of a request, live or ended not long ago.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// The request.
    pub id: RequestId,
    /// Where it is; of several completions, the furthest.
    pub state: RequestState,
    /// Why it does not run; `None` while it does, and when it has ended.
    pub waits_for: Option<WaitReason>,
    /// Requests that will be served before it, while it is queued.
    pub ahead: usize,
    /// What it will wait for its first step by the present rate, while it is queued and the rate is known.
    pub predicted_wait: Option<Duration>,
    /// As it was given.
    pub priority: i32,
    /// As it was given.
    pub tenant: TenantId,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache when it was first admitted.
    pub cached_tokens: usize,
    /// Tokens generated, over all its completions.
    pub completion_tokens: usize,
    /// KV blocks that it holds, shared ones included.
    pub kv_blocks: usize,
    /// Times it was preempted.
    pub num_preemptions: usize,
    /// What happened to it, oldest first. Of a long life, the middle is left out.
    pub life: Vec<LifeEvent>,
    /// Events that were left out.
    pub events_left_out: usize,
}

/// A request's whole life, for whoever keeps records.
#[derive(Debug, Clone)]
pub struct EndedLife {
    /// When it was submitted: the times of its events count from here.
    pub submitted: Instant,
    /// What [`GenerateRequest::trace_parent`](crate::request::GenerateRequest::trace_parent) was.
    pub trace_parent: Option<Arc<str>>,
    /// The rest; its state is [`RequestState::Ended`].
    pub explanation: Explanation,
}

/// Where a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RequestState {
    /// Waiting for its first step.
    Queued,
    /// Its prompt is being read.
    Prefill,
    /// It generates.
    Decode,
    /// It lost its blocks to others and waits for new ones.
    Preempted,
    /// Its client does not read.
    Parked,
    /// It is over.
    Ended,
}

/// Something that happened to a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LifeEvent {
    /// Since its submission.
    pub at: Duration,
    /// Which of its completions; 0 for what concerns all of them.
    pub index: u32,
    /// What.
    pub what: Life,
}

/// What can happen to a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Life {
    /// It entered the queue.
    Queued,
    /// It got a row of the batch for the first time.
    Admitted {
        /// Prompt tokens found in the prefix cache.
        cached_tokens: usize,
    },
    /// A step read a part of its prompt.
    Chunk {
        /// Tokens of the part.
        tokens: usize,
        /// Tokens that are in the KV cache now.
        computed: usize,
    },
    /// It gave its first token.
    FirstToken,
    /// It lost its blocks to others.
    Preempted,
    /// It got a row again after a preemption or after it was parked.
    Resumed {
        /// Tokens found in the prefix cache: these need not be computed again.
        cached_tokens: usize,
    },
    /// Its client did not read.
    Parked,
    /// Its client read again.
    Unparked,
    /// It ended without an error.
    Finished(FinishReason),
    /// It ended in an error.
    Failed(ErrorCode),
    /// Its stream was dropped.
    Dropped,
}
