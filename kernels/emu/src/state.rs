//! What a driver knows, and how its queue runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use tidemill_kernels::{KernelError, cuda::driver::Result};

use crate::{
    config::{EmuConfig, Failure},
    memory::{DeviceMemory, PinnedMemory},
    runtime::{How, Site, Stats},
    schedule::Schedule,
    stream::{Launch, Op, Queue},
};

/// Operations that may wait in the queue before it runs by itself.
const LONG_QUEUE: usize = 512;

/// An event's last recording.
#[derive(Clone, Copy, Default)]
pub(crate) struct Event {
    /// The number of the recording in the queue.
    recorded: Option<u64>,
    reached: Option<Instant>,
    waited: bool,
}

pub(crate) struct State {
    pub(crate) schedule: Schedule,
    eager: bool,
    cluster: u32,
    shared_skew: u32,
    pub(crate) device: DeviceMemory,
    pub(crate) pinned: PinnedMemory,
    queue: Queue,
    /// What was recorded since the capture began, while there is one.
    pub(crate) capture: Option<Vec<Op>>,
    pub(crate) graphs: BTreeMap<u64, Arc<[Op]>>,
    pub(crate) events: BTreeMap<u64, Event>,
    next_id: u64,
    /// The sticky error.
    lost: Option<String>,
    /// Mistakes in calls that return nothing, for the next call to report.
    mistakes: Vec<String>,
    /// Launches still to come before one fails, counted down.
    failure: Option<(u64, Failure)>,
    pub(crate) skip: Option<Site>,
    pub(crate) sites: BTreeSet<Site>,
    pub(crate) stats: Stats,
}

impl State {
    pub(crate) fn new(config: &EmuConfig) -> Self {
        Self {
            schedule: config.schedule,
            eager: config.eager,
            cluster: config.cluster,
            shared_skew: config.shared_skew,
            device: DeviceMemory::new(config.info.total_memory),
            pinned: PinnedMemory::default(),
            queue: Queue::default(),
            capture: None,
            graphs: BTreeMap::new(),
            events: BTreeMap::new(),
            next_id: 0,
            lost: None,
            mistakes: Vec::new(),
            failure: None,
            skip: None,
            sites: BTreeSet::new(),
            stats: Stats::default(),
        }
    }

    pub(crate) fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Refuses every call on a lost device, and reports a mistake that an earlier call could not.
    pub(crate) fn enter(&mut self, call: &'static str) -> Result<()> {
        if let Some(detail) = &self.lost {
            return Err(KernelError::DeviceLost { call, detail: detail.clone() });
        }
        if self.mistakes.is_empty() {
            return Ok(());
        }
        Err(KernelError::Device {
            call,
            detail: format!("earlier: {}", self.mistakes.drain(..).collect::<Vec<_>>().join("; ")),
        })
    }

    /// As [`State::enter`], for a call that a capture cannot record.
    pub(crate) fn enter_outside_capture(&mut self, call: &'static str) -> Result<()> {
        self.enter(call)?;
        if self.capture.is_some() {
            return Err(refused(call, "not allowed while a graph is captured"));
        }
        Ok(())
    }

    /// Notes a mistake in a call that returns nothing.
    pub(crate) fn mistake(&mut self, call: &'static str, detail: impl Into<String>) {
        self.mistakes.push(format!("{call}: {}", detail.into()));
    }

    /// Mistakes that no call has reported yet.
    pub(crate) fn unreported(&mut self) -> Vec<String> {
        std::mem::take(&mut self.mistakes)
    }

    pub(crate) fn lose(&mut self, detail: String) {
        self.lost.get_or_insert(detail);
        // Nothing queued runs any more, but what the host has freed is gone.
        while let Some(op) = self.queue.pop_until(u64::MAX) {
            if let Op::Free(address) = op {
                self.unmap(address);
            }
        }
    }

    pub(crate) fn plan_failure(&mut self, launches_before: u64, failure: Failure) {
        self.failure = Some((launches_before, failure));
    }

    /// The failure that a test has planned for this launch.
    pub(crate) fn due_failure(&mut self) -> Option<Failure> {
        let (before, failure) = self.failure.as_mut()?;
        if *before > 0 {
            *before -= 1;
            return None;
        }
        let failure = *failure;
        self.failure = None;
        Some(failure)
    }

    /// Records into the capture, or queues.
    pub(crate) fn submit(&mut self, call: &'static str, op: Op) -> Result<()> {
        if let Some((address, bytes)) = op.device_range() {
            self.device.check(address, bytes).map_err(|detail| refused(call, detail))?;
        }
        match &mut self.capture {
            Some(ops) => {
                ops.push(op);
                Ok(())
            }
            None => self.push(call, op).map(drop),
        }
    }

    /// Queues, runs what must not wait, and returns the operation's number.
    pub(crate) fn push(&mut self, call: &'static str, op: Op) -> Result<u64> {
        let number = self.queue.push(op);
        if self.eager || self.queue.len() > LONG_QUEUE {
            self.run_until(call, number)?;
        }
        Ok(number)
    }

    /// Runs the queue up to the operation of this number.
    pub(crate) fn run_until(&mut self, call: &'static str, number: u64) -> Result<()> {
        while let Some(op) = self.queue.pop_until(number) {
            if let Err(detail) = self.run(&op) {
                self.lose(detail.clone());
                return Err(KernelError::DeviceLost { call, detail });
            }
        }
        Ok(())
    }

    /// Runs all that is queued.
    pub(crate) fn run_all(&mut self, call: &'static str) -> Result<()> {
        self.run_until(call, u64::MAX)?;
        for event in self.events.values_mut() {
            event.waited |= event.reached.is_some();
        }
        Ok(())
    }

    fn run(&mut self, op: &Op) -> std::result::Result<(), String> {
        match op {
            Op::Launch(launch) => self.run_launch(launch)?,
            Op::Graph(ops) => ops.iter().try_for_each(|op| self.run(op))?,
            Op::Record(id) => {
                if let Some(event) = self.events.get_mut(id) {
                    event.reached = Some(Instant::now());
                }
            }
            Op::Free(address) => self.unmap(*address),
            Op::Fault => return Err("a fault that the test asked for".into()),
            // SAFETY: the ranges were checked when it was queued, and an allocation is unmapped in the order of the queue.
            transfer => unsafe { transfer.transfer() },
        }
        Ok(())
    }

    fn run_launch(&mut self, launch: &Launch) -> std::result::Result<(), String> {
        let how = How {
            schedule: self.schedule,
            cluster: self.cluster,
            shared_skew: self.shared_skew,
            skip: self.skip.as_ref(),
        };
        let outcome = launch.run(how);
        self.stats = outcome.stats;
        self.sites.extend(outcome.sites);
        outcome.result
    }

    fn unmap(&mut self, address: u64) {
        if let Err(detail) = self.device.unmap(address) {
            self.mistake("free", detail);
        }
    }

    /// Whether something queued reads or writes host memory in this range.
    pub(crate) fn host_range_in_use(&self, range: &std::ops::Range<usize>) -> bool {
        self.queue.iter().any(|op| op.touches_host(range))
    }

    pub(crate) fn graph_in_use(&self, graph: &Arc<[Op]>) -> bool {
        self.queue.iter().any(|op| matches!(op, Op::Graph(queued) if Arc::ptr_eq(queued, graph)))
    }

    pub(crate) fn record(&mut self, id: u64) -> Result<()> {
        const CALL: &str = "record";
        let number = self.queue.end();
        let event = self.event(CALL, id)?;
        if event.recorded.is_some() && !event.waited {
            return Err(refused(CALL, "the event was recorded before and nobody has waited for it"));
        }
        *event = Event { recorded: Some(number), ..Event::default() };
        self.push(CALL, Op::Record(id)).map(drop)
    }

    pub(crate) fn wait(&mut self, id: u64) -> Result<()> {
        const CALL: &str = "wait";
        let Some(number) = self.event(CALL, id)?.recorded else {
            return Err(refused(CALL, "the event was never recorded"));
        };
        self.run_until(CALL, number)?;
        self.event(CALL, id)?.waited = true;
        Ok(())
    }

    /// A lazy stream runs when somebody waits, so that this turns true only then.
    pub(crate) fn is_reached(&mut self, id: u64) -> Result<bool> {
        const CALL: &str = "is_reached";
        let event = self.event(CALL, id)?;
        if event.recorded.is_none() {
            return Err(refused(CALL, "the event was never recorded"));
        }
        Ok(event.reached.is_some())
    }

    pub(crate) fn elapsed_ms(&mut self, start: u64, end: u64) -> Result<f32> {
        const CALL: &str = "elapsed";
        let mut reached = |id| match *self.event(CALL, id)? {
            Event { reached: Some(at), waited: true, .. } => Ok(at),
            _ => Err(refused(CALL, "an event was not recorded, or not waited for")),
        };
        let (start, end) = (reached(start)?, reached(end)?);
        Ok(end.saturating_duration_since(start).as_secs_f32() * 1e3)
    }

    fn event(&mut self, call: &'static str, id: u64) -> Result<&mut Event> {
        self.events.get_mut(&id).ok_or_else(|| refused(call, "no such event"))
    }
}

/// An error of one call; the device works on.
pub(crate) fn refused(call: &'static str, detail: impl Into<String>) -> KernelError {
    KernelError::Device { call, detail: detail.into() }
}
