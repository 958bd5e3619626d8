//! The engine thread: commands in, steps out, effects to the ledger.
//!
//! One loop over two sources: commands from handles ([`command`]), and results from the runner ([`step`]). While a step runs, the next one
//! is planned and queued behind it, so the device does not wait for the plan; and commands are handled as they come, so an abort
//! frees its blocks at once and not at the end of the step. Without work the thread sleeps.

mod activity;
mod command;
mod end;
mod explain;
mod readers;
mod step;
mod submit;
mod watch;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use activity::PastAborts;
use command::{Answer, Draining};
pub(crate) use command::{Command, Submission};
use crossbeam_channel::{Receiver, never, select_biased};
use step::InFlight;
use watch::Watchers;

use crate::{
    admission::Admission,
    error::StopReason,
    explain::EndedLife,
    kv::BlockPool,
    ledger::Ledger,
    queue::Queue,
    runner::RunnerThread,
    scheduler::{Effect, MAX_IN_FLIGHT, Note, Pacer, Scheduler, SchedulerConfig},
    stats::{Counters, SharedStats},
};

/// What an engine thread is made of.
pub(crate) struct Parts {
    pub scheduler: SchedulerConfig,
    pub pool: BlockPool,
    pub runner: RunnerThread,
    pub commands: Receiver<Command>,
    pub stats: Arc<SharedStats>,
    pub queue: Arc<Queue>,
    pub lives: Option<async_channel::Sender<EndedLife>>,
    pub settings: Settings,
}

/// What an engine thread is told.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub look_ahead: bool,
    pub target_itl: Option<Duration>,
    pub max_queue_time: Option<Duration>,
    pub slow_reader_timeout: Duration,
    pub kv_cache_events: bool,
    /// Tells the cached prefixes of models apart.
    pub model_name: String,
}

/// Everything the engine thread owns.
pub(crate) struct Core {
    settings: Settings,
    pool: BlockPool,
    scheduler: Scheduler,
    pacer: Pacer,
    admission: Admission,
    ledger: Ledger,
    watchers: Watchers,
    queue: Arc<Queue>,
    commands: Receiver<Command>,
    stats: Arc<SharedStats>,
    counters: Counters,
    next_seq: u64,
    /// Steps in flight at most: 1, or [`MAX_IN_FLIGHT`] with look-ahead.
    depth: usize,
    /// Oldest first.
    in_flight: VecDeque<InFlight>,
    /// When the newest step that is done was.
    last_done: Option<Instant>,
    /// The runner knows that nothing is to run behind the step in flight.
    said_no_more: bool,
    draining: Vec<Draining>,
    past_aborts: PastAborts,
    /// Answers that wait until the statistics say what they say.
    answers: Vec<Answer>,
    /// Empty between uses; their memory is kept.
    notes: Vec<Note>,
    effects: Vec<Effect>,
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
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { scheduler, pool, runner, commands, stats, queue, lives, settings } = parts;
        Self {
            pacer: Pacer::new(settings.target_itl, scheduler.limits.max_num_batched_tokens),
            scheduler: Scheduler::new(scheduler, pool.clone()),
            admission: Admission::new(settings.max_queue_time),
            ledger: Ledger::new(lives),
            watchers: Watchers::default(),
            pool,
            queue,
            runner,
            commands,
            stats,
            counters: Counters::default(),
            next_seq: 0,
            said_no_more: false,
            depth: if settings.look_ahead { MAX_IN_FLIGHT } else { 1 },
            in_flight: VecDeque::with_capacity(MAX_IN_FLIGHT),
            last_done: None,
            draining: Vec::new(),
            past_aborts: PastAborts::default(),
            answers: Vec::new(),
            notes: Vec::new(),
            effects: Vec::new(),
            settings,
        }
    }

    /// Runs until shutdown or failure; returns why it ended, after everything that was open was told so.
    pub(crate) fn run(&mut self) -> StopReason {
        let reason = self.run_until_stopped();
        for ticket in self.ledger.tickets() {
            self.fail(ticket, reason.error(), Instant::now());
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

    /// Sleeps until there is something to do, and does it.
    fn wait(&mut self) -> Flow {
        let grace = self.draining.iter().filter_map(|d| d.deadline);
        let timer = grace.chain(self.ledger.next_timer()).min().map_or_else(never, crossbeam_channel::at);
        let (commands, results) = (self.commands.clone(), self.runner.results().clone());
        // Commands first: an abort must not wait behind a result whose tokens nobody wants any more.
        select_biased! {
            recv(commands) -> command => {
                let flow = match command {
                    Ok(command) => self.handle_all(command),
                    Err(_) => Flow::stop("every handle is gone"),
                };
                // However many commands come, results are taken between them.
                match (flow, results.try_recv()) {
                    (Flow::Continue, Ok(finished)) => self.take(finished),
                    (flow, _) => flow,
                }
            },
            recv(results) -> result => match result {
                Ok(finished) => self.take(finished),
                Err(_) => Flow::stop("the runner is gone"),
            },
            recv(timer) -> _ => Flow::Continue,
        }
    }

    /// Lets others read how things stand.
    fn publish(&mut self) {
        if self.settings.kv_cache_events {
            self.watchers.report(&self.pool);
        }
        self.counters.preemptions = self.scheduler.num_preemptions();
        self.counters.lives_lost = self.ledger.lives_lost();
        self.queue.publish_interval(self.admission.interval());
        self.stats.publish(self.scheduler.num_in_flight() > 0, |published| {
            published.running = self.scheduler.num_running();
            published.waiting = self.scheduler.num_waiting();
            published.parked = self.scheduler.num_parked();
            published.counters = self.counters;
            published.histograms.copy_from(&self.ledger.histograms);
        });
    }
}
