//! The engine from outside: a cheap handle to submit, abort, read and drain.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::Sender;

use crate::{
    activity::Activity,
    adapters::Adapters,
    core::{Command, Submission},
    embedding::{PendingEmbedding, PendingScore},
    error::{RequestError, StopReason},
    explain::Explanation,
    generation::{Generation, Stream},
    heads::Heads,
    ids::{RequestId, Ticket},
    info::ModelInfo,
    kv::KvEventBatch,
    output::AbortReceipt,
    queue::Queue,
    request::{
        EmbedRequest, GenerateRequest, ScoreRequest, ValidatedEmbed, ValidatedRequest, ValidatedScore,
        Validator,
    },
    stats::{EngineStats, SharedStats},
    stopped::Stopped,
    text::TextModel,
    unread::Unread,
};

/// What handles and the engine thread share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub info: ModelInfo,
    pub text: Arc<TextModel>,
    pub adapters: Arc<Adapters>,
    pub validator: Validator,
    pub stats: Arc<SharedStats>,
    /// Requests that were submitted and have no row of the batch yet.
    pub queue: Arc<Queue>,
    /// Tokens that a stream may hold unread.
    pub max_stream_buffer: usize,
    pub next_ticket: AtomicU64,
    /// Why the engine stopped, once it did.
    pub stopped: Stopped,
    /// Closed when the engine thread ends.
    pub alive: async_channel::Receiver<()>,
}

/// A handle to a running engine. Cheap to clone; usable from any thread and any async runtime.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    pub(crate) commands: Sender<Command>,
    pub(crate) shared: Arc<Shared>,
}

impl EngineHandle {
    /// What is loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.shared.info
    }

    /// Encoding, decoding, chat templates.
    pub fn text(&self) -> &Arc<TextModel> {
        &self.shared.text
    }

    /// The adapters that requests can name in place of the model.
    pub fn adapters(&self) -> &Arc<Adapters> {
        &self.shared.adapters
    }

    /// Checks a request; see [`Validator::validate`], also for where to call it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn validate(&self, request: GenerateRequest) -> Result<ValidatedRequest, RequestError> {
        self.shared.validator.validate(request)
    }

    /// Queues a request. Returns at once; the outcome streams through the [`Generation`]. Dropping that aborts the request.
    ///
    /// # Errors
    /// [`RequestError::QueueFull`], [`RequestError::Draining`], [`RequestError::EngineStopped`],
    /// [`RequestError::DeviceLost`]. An id that is live already and a wait that would be too long ([`RequestError::Overloaded`]) are
    /// reported by the stream, at once.
    pub fn submit(&self, request: ValidatedRequest) -> Result<Generation, RequestError> {
        self.enqueue(request, |request, stream| Generation::new(request, stream, self.clone()))
    }

    /// Checks a request for an embedding; see [`Validator::validate_embed`], also for where to call it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn validate_embed(&self, request: EmbedRequest) -> Result<ValidatedEmbed, RequestError> {
        self.shared.validator.validate_embed(request)
    }

    /// Queues a request for an embedding, as [`submit`](Self::submit) does one for tokens. Dropping the [`PendingEmbedding`] aborts it.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn submit_embed(&self, embed: ValidatedEmbed) -> Result<PendingEmbedding, RequestError> {
        let ValidatedEmbed { request, shape } = embed;
        self.enqueue(request, |request, stream| {
            PendingEmbedding::new(request.id.clone(), shape, stream, self.clone())
        })
    }

    /// Checks a request for a score; see [`Validator::validate_score`], also for where to call it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn validate_score(&self, request: ScoreRequest) -> Result<ValidatedScore, RequestError> {
        self.shared.validator.validate_score(request)
    }

    /// Queues a request for a score, as [`submit`](Self::submit) does one for tokens. Dropping the [`PendingScore`] aborts it.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn submit_score(&self, score: ValidatedScore) -> Result<PendingScore, RequestError> {
        let ValidatedScore { request, use_activation } = score;
        self.enqueue(request, |request, stream| {
            PendingScore::new(request.id.clone(), use_activation, stream, self.clone())
        })
    }

    pub(crate) fn heads(&self) -> Arc<Heads> {
        self.shared.validator.heads.clone()
    }

    /// Takes a place in the queue and hands the request to the engine thread; `answer` makes the caller's side of it.
    fn enqueue<T>(
        &self,
        request: ValidatedRequest,
        answer: impl FnOnce(&ValidatedRequest, Stream) -> T,
    ) -> Result<T, RequestError> {
        let refuse = |error| {
            self.shared.stats.count_refusal();
            Err(error)
        };
        if let Some(reason) = self.shared.stopped.get() {
            return Err(reason.error());
        }
        if self.shared.stats.is_draining() {
            return refuse(RequestError::Draining);
        }
        let slot = match self.shared.queue.take(request.prompt.len()) {
            Ok(slot) => slot,
            Err(error) => return refuse(error),
        };
        let ticket = Ticket(self.shared.next_ticket.fetch_add(1, Relaxed));
        // Nothing is lost on the way. The bound is that a request whose stream is unread is parked.
        let (events_tx, events) = async_channel::unbounded();
        let unread = Arc::new(Unread::new(self.shared.max_stream_buffer));
        let stream = Stream { ticket, events, unread: unread.clone() };
        let answer = answer(&request, stream);
        let submitted = Instant::now();
        let submission = Submission { ticket, request, events: events_tx, unread, slot, submitted };
        match self.commands.send(Command::Submit(Box::new(submission))) {
            Ok(()) => Ok(answer),
            Err(_) => Err(self.stop_reason().error()),
        }
    }

    /// Ends a request at any stage. Idempotent: unknown and finished ids are answers.
    ///
    /// # Errors
    /// [`RequestError::EngineStopped`], [`RequestError::DeviceLost`].
    pub async fn abort(&self, id: RequestId) -> Result<AbortReceipt, RequestError> {
        let stopped = |_| self.stop_reason().error();
        self.start_abort(id)?.recv().await.map_err(stopped)
    }

    /// [`abort`](Self::abort) for callers without an async runtime.
    ///
    /// # Errors
    /// [`RequestError::EngineStopped`], [`RequestError::DeviceLost`].
    pub fn abort_blocking(&self, id: RequestId) -> Result<AbortReceipt, RequestError> {
        let stopped = |_| self.stop_reason().error();
        self.start_abort(id)?.recv_blocking().map_err(stopped)
    }

    fn start_abort(&self, id: RequestId) -> Result<async_channel::Receiver<AbortReceipt>, RequestError> {
        let (reply, receipt) = async_channel::bounded(1);
        let command = Command::Abort { id, received: Instant::now(), reply };
        match self.commands.send(command) {
            Ok(()) => Ok(receipt),
            Err(_) => Err(self.stop_reason().error()),
        }
    }

    /// Ends every live request, queued or running, and takes new ones as before. One receipt for each, in order of submission.
    ///
    /// # Errors
    /// [`RequestError::EngineStopped`], [`RequestError::DeviceLost`].
    pub async fn abort_all(&self) -> Result<Vec<AbortReceipt>, RequestError> {
        let (reply, receipts) = async_channel::bounded(1);
        let stopped = || self.stop_reason().error();
        let command = Command::AbortAll { received: Instant::now(), reply };
        self.commands.send(command).map_err(|_| stopped())?;
        receipts.recv().await.map_err(|_| stopped())
    }

    /// Why a request waits, and its life so far; `None` for one that was never seen or ended long ago.
    ///
    /// # Errors
    /// [`RequestError::EngineStopped`], [`RequestError::DeviceLost`].
    pub async fn explain(&self, id: RequestId) -> Result<Option<Explanation>, RequestError> {
        let (reply, explanation) = async_channel::bounded(1);
        let stopped = || self.stop_reason().error();
        self.commands.send(Command::Explain { id, reply }).map_err(|_| stopped())?;
        explanation.recv().await.map_err(|_| stopped())
    }

    /// The engine at work: batch, queue, blocks and the last aborts. Computed when asked for; the ids of all requests are in it.
    ///
    /// # Errors
    /// [`RequestError::EngineStopped`], [`RequestError::DeviceLost`].
    pub async fn activity(&self) -> Result<Activity, RequestError> {
        let (reply, activity) = async_channel::bounded(1);
        let stopped = || self.stop_reason().error();
        self.commands.send(Command::Activity { reply }).map_err(|_| stopped())?;
        activity.recv().await.map_err(|_| stopped())
    }

    /// Everything that the prefix cache holds, and then its changes.
    ///
    /// # Errors
    /// [`RequestError::Unsupported`] when the engine was started without KV cache events; [`RequestError::EngineStopped`],
    /// [`RequestError::DeviceLost`].
    pub async fn watch_kv(&self) -> Result<KvWatch, RequestError> {
        let (reply, watch) = async_channel::bounded(1);
        let stopped = || self.stop_reason().error();
        self.commands.send(Command::WatchKv { reply }).map_err(|_| stopped())?;
        watch.recv().await.map_err(|_| stopped())?
    }

    /// Forgets all cached prefixes that no live request uses; those in use are not found by others any more. Returns how many blocks became free.
    ///
    /// # Errors
    /// [`RequestError::EngineStopped`], [`RequestError::DeviceLost`].
    pub async fn reset_prefix_cache(&self) -> Result<usize, RequestError> {
        let (reply, freed) = async_channel::bounded(1);
        let stopped = || self.stop_reason().error();
        self.commands.send(Command::ResetPrefixCache { reply }).map_err(|_| stopped())?;
        freed.recv().await.map_err(|_| stopped())
    }

    /// Gauges and counters now.
    pub fn stats(&self) -> EngineStats {
        self.shared.stats.read()
    }

    /// Refuses new requests from now on and waits for the live ones; those that are left after `grace` end with
    /// [`RequestError::Draining`]. Returns how many ended by themselves and how many were cut off.
    ///
    /// # Errors
    /// [`RequestError::EngineStopped`], [`RequestError::DeviceLost`].
    pub async fn drain(&self, grace: Duration) -> Result<Drained, RequestError> {
        self.shared.stats.set_draining();
        let (reply, drained) = async_channel::bounded(1);
        let command = Command::Drain { deadline: Instant::now().checked_add(grace), reply };
        let stopped = || self.stop_reason().error();
        self.commands.send(command).map_err(|_| stopped())?;
        drained.recv().await.map_err(|_| stopped())
    }

    /// Whether the engine thread has ended.
    pub fn is_stopped(&self) -> bool {
        self.shared.stopped.get().is_some()
    }

    /// Resolves when the engine thread has ended, with the reason.
    pub async fn stopped(&self) -> StopReason {
        // Nothing is ever sent: the channel closes.
        let _ = self.shared.alive.recv().await;
        self.stop_reason()
    }

    pub(crate) fn stop_reason(&self) -> StopReason {
        self.shared.stopped.reason()
    }
}

/// What a drain did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drained {
    /// Requests that ended by themselves.
    pub finished: usize,
    /// Requests that were cut off.
    pub cut_off: usize,
}

/// The prefix cache as it is and as it changes.
#[derive(Debug)]
pub struct KvWatch {
    pub(crate) batches: async_channel::Receiver<KvEventBatch>,
}

impl KvWatch {
    /// The next batch; the first is the snapshot. `None` when the engine has stopped, or when the reader has fallen so far behind that it
    /// must watch anew.
    pub async fn next(&mut self) -> Option<KvEventBatch> {
        self.batches.recv().await.ok()
    }
}
