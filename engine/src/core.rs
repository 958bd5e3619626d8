//! The engine thread: commands in, steps out, effects to the ledger.
//!
//! One loop over two sources: commands from handles, and results from the runner. While a step runs, the next one is planned
//! and queued behind it, so the device does not wait for the plan; and commands are handled as they come, so an abort
//! frees its blocks at once and not at the end of the step. Without work the thread sleeps.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, never, select_biased};

use crate::{
    error::{RequestError, StopReason},
    event::Event,
    explain::Explanation,
    handle::{Drained, KvWatch},
    ids::{RequestId, SeqId, Ticket},
    ledger::{Delivery, Ledger, Opening},
    output::{AbortReceipt, AbortStage, FinishReason},
    queue::QueueSlot,
    request::ValidatedRequest,
    runner::{Finished, RunnerThread},
    sampling::Sampling,
    scheduler::{Effect, MAX_IN_FLIGHT, NewSequence, Removed, Scheduler, Stage, StepOutput, StepPlan},
    stats::{Counters, Published, SharedStats},
};

/// A request on its way into the engine.
#[derive(Debug)]
pub(crate) struct Submission {
    pub ticket: Ticket,
    pub request: ValidatedRequest,
    pub events: async_channel::Sender<Event>,
    pub slot: QueueSlot,
    pub submitted: Instant,
}

/// What handles ask of the engine thread.
#[derive(Debug)]
pub(crate) enum Command {
    Submit(Box<Submission>),
    /// By the client's id; answered with a receipt.
    Abort {
        id: RequestId,
        received: Instant,
        reply: async_channel::Sender<AbortReceipt>,
    },
    /// The stream of this submission was dropped.
    Drop {
        ticket: Ticket,
    },
    /// A stop string ended this completion.
    Stop {
        ticket: Ticket,
        index: u32,
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
struct Draining {
    deadline: Option<Instant>,
    open_at_start: usize,
    reply: async_channel::Sender<Drained>,
}

/// Everything the engine thread owns.
pub(crate) struct Core {
    scheduler: Scheduler,
    ledger: Ledger,
    commands: Receiver<Command>,
    stats: Arc<SharedStats>,
    counters: Counters,
    next_seq: u64,
    /// Steps in flight at most: 1, or [`MAX_IN_FLIGHT`] with look-ahead.
    depth: usize,
    /// The runner knows that nothing is to run behind the step in flight.
    said_no_more: bool,
    draining: Vec<Draining>,
    /// Dropped last: it waits for a thread that a lost device may hold up, and whoever sent a command shall not.
    runner: RunnerThread,
}

/// Whether the loop goes on.
enum Flow {
    Continue,
    Stop(StopReason),
}

impl Flow {
    fn stop(reason: &str) -> Self {
        Self::Stop(StopReason::Stopped(reason.into()))
    }
}

impl Core {
    pub(crate) fn new(
        scheduler: Scheduler,
        runner: RunnerThread,
        commands: Receiver<Command>,
        stats: Arc<SharedStats>,
        look_ahead: bool,
    ) -> Self {
        Self {
            scheduler,
            ledger: Ledger::default(),
            runner,
            commands,
            stats,
            counters: Counters::default(),
            next_seq: 0,
            said_no_more: false,
            depth: if look_ahead { MAX_IN_FLIGHT } else { 1 },
            draining: Vec::new(),
        }
    }

    /// Runs until shutdown or failure; returns why it ended, after everything that was open was told so.
    pub(crate) fn run(&mut self) -> StopReason {
        let reason = self.run_until_stopped();
        for ticket in self.ledger.tickets() {
            self.fail(ticket, reason.error());
        }
        reason
    }

    fn run_until_stopped(&mut self) -> StopReason {
        loop {
            self.expire(Instant::now());
            while self.scheduler.num_in_flight() < self.depth && self.launch() {}
            if self.scheduler.num_in_flight() == 1 && !std::mem::replace(&mut self.said_no_more, true) {
                self.runner.no_more();
            }
            self.publish();
            if let Flow::Stop(reason) = self.wait() {
                return reason;
            }
        }
    }

    /// Plans and launches a step. False when there is nothing to run for now.
    fn launch(&mut self) -> bool {
        let plan = self.scheduler.plan(|_| usize::MAX);
        if plan.rows.is_empty() {
            return false;
        }
        let now = Instant::now();
        plan.rows.iter().for_each(|row| self.ledger.scheduled(row.seq, now));
        self.stats.beat();
        self.said_no_more = false;
        self.runner.launch(plan);
        true
    }

    /// Sleeps until there is something to do, and does it.
    fn wait(&mut self) -> Flow {
        let deadline =
            self.draining.iter().filter_map(|d| d.deadline).chain(self.ledger.next_deadline()).min();
        let timer = deadline.map_or_else(never, crossbeam_channel::at);
        let (commands, results) = (self.commands.clone(), self.runner.results().clone());
        // Commands first: an abort must not wait behind a result whose tokens nobody wants any more.
        select_biased! {
            recv(commands) -> command => match command {
                Ok(command) => self.handle_all(command),
                Err(_) => Flow::stop("every handle is gone"),
            },
            recv(results) -> result => match result {
                Ok(finished) => self.take(finished),
                Err(_) => Flow::stop("the runner is gone"),
            },
            recv(timer) -> _ => Flow::Continue,
        }
    }

    fn take(&mut self, finished: Finished) -> Flow {
        match finished {
            Ok((plan, output)) => {
                self.stats.beat();
                self.said_no_more = false;
                self.resolve(plan, output);
                Flow::Continue
            }
            Err(lost) => Flow::Stop(StopReason::DeviceLost(lost.to_string())),
        }
    }

    /// Handles a command and those that queue behind it: requests that arrive together start in one step.
    fn handle_all(&mut self, first: Command) -> Flow {
        let mut flow = self.handle(first);
        for _ in 0..self.commands.len() {
            match (&flow, self.commands.try_recv()) {
                (Flow::Continue, Ok(command)) => flow = self.handle(command),
                _ => break,
            }
        }
        flow
    }

    fn handle(&mut self, command: Command) -> Flow {
        match command {
            Command::Submit(submission) => self.submit(*submission),
            Command::Abort { id, received, reply } => {
                let receipt = self.abort(id, received);
                // Whoever reads the statistics after the receipt finds it in them.
                self.publish();
                // Whoever asked may have gone; the abort stands.
                drop(reply.try_send(receipt));
            }
            Command::Drop { ticket } => {
                self.remove_seqs(ticket);
                self.counters.aborted += u64::from(self.ledger.discard(ticket));
            }
            Command::Stop { ticket, index } => {
                if let Some(seq) = self.ledger.seq(ticket, index) {
                    self.scheduler.remove(seq);
                    let over = self.ledger.finish(ticket, index, FinishReason::Stop);
                    self.counters.finished += u64::from(over);
                }
            }
            Command::Drain { deadline, reply } => {
                self.stats.set_draining();
                self.draining.push(Draining { deadline, open_at_start: self.ledger.num_open(), reply });
            }
            Command::Explain { reply, .. } => drop(reply.try_send(None)),
            Command::WatchKv { reply } => {
                let error = RequestError::Unsupported("this engine has no prefix cache".into());
                drop(reply.try_send(Err(error)));
            }
            Command::ResetPrefixCache { reply } => drop(reply.try_send(0)),
            Command::Shutdown => return Flow::stop("it was shut down"),
        }
        Flow::Continue
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { ticket, request, events, slot, submitted } = submission;
        // Receivers that are gone already will send their own Drop command.
        let refuse = |error| drop(events.try_send(Event::Failed(error)));
        if self.stats.is_draining() {
            self.counters.refused += 1;
            return refuse(RequestError::Draining);
        }
        if self.ledger.find(&request.id).is_some() {
            self.counters.refused += 1;
            return refuse(RequestError::DuplicateId(request.id.to_string()));
        }
        debug_assert!(self.scheduler.fits(request.prompt.len(), request.sampling.max_tokens), "validated");
        self.counters.prompt_tokens += request.prompt.len() as u64;
        let first = SeqId(self.next_seq);
        let seqs: Vec<SeqId> = (0..u64::from(request.n)).map(|i| SeqId(self.next_seq + i)).collect();
        self.next_seq += u64::from(request.n);
        let mut sampling = request.sampling;
        let root = self.scheduler.prefix_root(&[&request.credential, &request.cache_salt], first.0);
        self.ledger.open(Opening {
            ticket,
            id: request.id,
            events,
            seqs: seqs.clone(),
            prompt_tokens: request.prompt.len(),
            submitted,
            deadline: request.deadline,
            slot,
        });
        for (index, &id) in (0..).zip(&seqs) {
            if index == 1 && sampling.prompt_logprobs.is_some() {
                // The prompt is the same for all completions: the first one reports it.
                sampling = Arc::new(Sampling { prompt_logprobs: None, ..(*sampling).clone() });
            }
            self.scheduler.add(NewSequence {
                id,
                prompt: request.prompt.clone(),
                seed: sampling.seed_of(index),
                sampling: sampling.clone(),
                prompt_of: (id != first).then_some(first),
                priority: request.priority,
                tenant: request.tenant.clone(),
                root,
            });
        }
    }

    fn abort(&mut self, id: RequestId, received: Instant) -> AbortReceipt {
        let receipt = |id, stage, completion_tokens| AbortReceipt {
            id,
            stage,
            completion_tokens,
            blocks_freed: 0,
            rows_freed: 0,
            time_to_free: Duration::ZERO,
        };
        let Some(ticket) = self.ledger.find(&id) else {
            return match self.ledger.ended(&id) {
                Some(tokens) => receipt(id, AbortStage::Finished, tokens),
                None => receipt(id, AbortStage::Unknown, 0),
            };
        };
        let tokens = self.ledger.completion_tokens(ticket);
        let removed = self.remove_seqs(ticket);
        // The furthest of its completions says where the request was.
        let stage = match removed.iter().map(|r| r.stage).max() {
            Some(Stage::Decode) => AbortStage::Decode,
            Some(Stage::Prefill) => AbortStage::Prefill,
            Some(Stage::Queued) | None => AbortStage::Queued,
        };
        let time_to_free = received.elapsed();
        self.ledger.finish_all(ticket, FinishReason::Abort);
        self.counters.aborted += 1;
        AbortReceipt {
            blocks_freed: removed.iter().map(|r| r.blocks_freed).sum(),
            rows_freed: removed.iter().map(|r| r.rows_freed).sum(),
            time_to_free,
            ..receipt(id, stage, tokens)
        }
    }

    /// Takes a request's sequences out of the scheduler: everything it held is free afterwards.
    fn remove_seqs(&mut self, ticket: Ticket) -> Vec<Removed> {
        self.ledger.live_seqs(ticket).into_iter().filter_map(|seq| self.scheduler.remove(seq)).collect()
    }

    fn fail(&mut self, ticket: Ticket, error: RequestError) {
        self.remove_seqs(ticket);
        self.ledger.fail(ticket, error);
    }

    /// Ends what has waited too long: requests past their deadline, and whatever is left when a drain's grace is over.
    fn expire(&mut self, now: Instant) {
        for ticket in self.ledger.expired(now) {
            let completion_tokens = self.ledger.completion_tokens(ticket);
            self.fail(ticket, RequestError::DeadlineExceeded { completion_tokens });
            self.counters.failed += 1;
        }
        let over = |d: &Draining| d.deadline.is_some_and(|deadline| deadline <= now);
        let mut cut_off = 0;
        if self.draining.iter().any(over) {
            for ticket in self.ledger.tickets() {
                self.fail(ticket, RequestError::Draining);
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

    fn resolve(&mut self, plan: StepPlan, output: StepOutput) {
        let mut effects = Vec::new();
        self.scheduler.resolve(plan, output, &mut effects);
        self.counters.steps += 1;
        let now = Instant::now();
        for effect in effects {
            self.commit(effect, now);
        }
        if cfg!(debug_assertions) {
            self.scheduler.check();
        }
    }

    fn commit(&mut self, effect: Effect, now: Instant) {
        match effect {
            Effect::PromptLogprobs { seq, logprobs } => self.ledger.prompt_logprobs(seq, logprobs),
            Effect::Token { seq, token, logprobs, finish, num_preemptions } => {
                self.counters.generation_tokens += 1;
                let over = self.ledger.token(Delivery { seq, token, logprobs, finish, num_preemptions }, now);
                self.counters.finished += u64::from(over);
            }
            Effect::Failed { seq, position, error } => {
                if let Some(ticket) = self.ledger.ticket_of(seq) {
                    self.counters.failed += 1;
                    self.fail(
                        ticket,
                        match error {
                            None => RequestError::NotFinite { position },
                            Some(detail) => {
                                tracing::error!(detail, position, "a request failed in the runner");
                                RequestError::Internal(
                                    "the model failed on this request; see the server's log".into(),
                                )
                            }
                        },
                    );
                }
            }
        }
    }

    fn publish(&mut self) {
        self.counters.preemptions = self.scheduler.num_preemptions();
        let published = Published {
            running: self.scheduler.num_running(),
            waiting: self.scheduler.num_waiting(),
            counters: self.counters,
        };
        self.stats.publish(published, self.scheduler.num_in_flight() > 0);
    }
}
