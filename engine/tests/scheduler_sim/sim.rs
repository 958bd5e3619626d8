//! Runs a scenario: the host's part of the engine around a real scheduler, a real pool and a real queue of steps.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    mem::ManuallyDrop,
    rc::Rc,
    sync::Arc,
};

use tidemill_engine::{
    Pooling,
    ids::{SeqId, TokenId},
    kv::{BlockPool, CacheConfig},
    runner::StepQueue,
    sampling::Sampling,
    scheduler::{Effect, Limits, MAX_IN_FLIGHT, Note, Scheduler, SchedulerConfig, StepPlan, TokenInput},
};

use crate::{
    arrivals::tenant_id,
    check::{Cache, Contents},
    device::{Device, Wires},
    fairness::{Service, Size},
    model::{Script, mix},
    scenario::{Config, Event, Scenario, Whom},
    seen::Seen,
};

/// Where a sequence is, as far as the scheduler's notes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    Waiting,
    Running,
    Parked,
}

/// A live sequence of the simulation.
pub struct Live {
    pub request: u32,
    pub script: Script,
    pub sampling: Arc<Sampling>,
    /// Tokens of the script that came so far, the prompt included.
    pub known: usize,
    /// Its tokens are constrained.
    pub formed: bool,
    /// Prompt tokens that were scored.
    pub scored: usize,
    /// It gives an embedding.
    pub pooling: Option<Pooling>,
    /// Its prompt is computed in one step, and is nobody else's.
    pub whole: bool,
    /// Positions before which every hidden state that counts was given.
    pub pooled: usize,
    pub priority: i32,
    pub tenant: usize,
    /// Sequences of different domains share no block.
    pub domain: u64,
    /// 0: none.
    pub adapter: u64,
    /// The sequence that reads the prompt for this one too.
    pub prompt_of: Option<SeqId>,
    pub place: Where,
    /// It has had a row of the batch.
    pub admitted: bool,
    /// Steps in flight that contain it.
    pub in_flight: usize,
    /// Its client does not read.
    pub unread: bool,
}

/// A live request.
pub struct Request {
    pub seqs: Vec<SeqId>,
    pub deadline: Option<u64>,
}

thread_local! {
    /// The event that runs, for the report of a failure.
    pub static AT: Cell<usize> = const { Cell::new(0) };
    /// Which requests events happened to, so far.
    pub static PINS: RefCell<Vec<(usize, u32)>> = const { RefCell::new(Vec::new()) };
}

pub struct Sim {
    pub config: Config,
    pub pool: BlockPool,
    pub scheduler: Scheduler,
    pub steps: StepQueue<Device>,
    pub wires: Rc<RefCell<Wires>>,
    pub live: BTreeMap<SeqId, Live>,
    pub requests: BTreeMap<u32, Request>,
    pub next_seq: u64,
    /// What ended requests read and wrote, youngest first.
    pub conversations: VecDeque<(u32, Vec<TokenId>)>,
    /// In simulated milliseconds.
    pub now: u64,
    /// Sequences and loads of the steps in flight.
    pub flights: VecDeque<StepPlan>,
    pub contents: Contents,
    pub cache: Cache,
    pub service: Service,
    pub seen: Seen,
    pub notes: Vec<Note>,
    pub effects: Vec<Effect>,
    turns: u64,
    /// The first of the batch, and launches in a row that left it out.
    pub left_out: (Option<SeqId>, usize),
}

impl Sim {
    pub fn new(config: &Config) -> Self {
        let Config { block_size, blocks, host_blocks, .. } = *config;
        let key = std::array::from_fn(|at| mix(config.key ^ at as u64) as u8);
        let cache = CacheConfig { key, events: true, host_blocks };
        let pool = match config.caching {
            true => BlockPool::with_cache(blocks, block_size, cache),
            false => BlockPool::new(blocks, block_size),
        };
        let limits = Limits {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            long_prefill_token_threshold: config.long_prefill_token_threshold,
        };
        let weights = (0..).zip(config.weights).map(|(tenant, weight)| (tenant_id(tenant), weight)).collect();
        let wires = Rc::<RefCell<Wires>>::default();
        let device = Device::new(wires.clone(), block_size, blocks, host_blocks);
        Self {
            scheduler: Scheduler::new(
                SchedulerConfig { limits, policy: config.policy, weights, max_loras: config.max_loras },
                pool.clone(),
            ),
            steps: StepQueue::new(device),
            pool,
            wires,
            live: BTreeMap::new(),
            requests: BTreeMap::new(),
            next_seq: 0,
            conversations: VecDeque::new(),
            now: 0,
            flights: VecDeque::new(),
            contents: Contents::new(config),
            cache: Cache::default(),
            service: Service::new(config),
            seen: Seen::default(),
            notes: Vec::new(),
            effects: Vec::new(),
            turns: 0,
            left_out: (None, 0),
            config: config.clone(),
        }
    }

    /// Runs a scenario, and then until nothing is left.
    pub fn run(scenario: &Scenario) -> Seen {
        // Not dropped when it fails: what is broken would fail again while it is cleared up.
        PINS.with_borrow_mut(Vec::clear);
        let mut sim = ManuallyDrop::new(Self::new(&scenario.config));
        for (at, event) in scenario.events.iter().enumerate() {
            AT.set(at);
            sim.happen(event);
        }
        AT.set(scenario.events.len());
        sim.drain();
        ManuallyDrop::into_inner(sim).seen
    }

    fn happen(&mut self, event: &Event) {
        self.now += 1;
        self.expire();
        match *event {
            Event::Arrive(ref arrival) => self.arrive(arrival),
            Event::Abort(whom) => {
                if let Some(request) = self.find(whom) {
                    self.abort(request);
                }
            }
            Event::AbortGone(pick) => self.abort_gone(pick),
            Event::Stop(whom, index) => self.stop(whom, index),
            Event::Park(whom) => self.set_unread(whom, true),
            Event::Unpark(whom) => self.set_unread(whom, false),
            Event::Reset => self.reset(),
            Event::FailLaunch => self.wires.borrow_mut().fail_launch = true,
            Event::FailStep => self.wires.borrow_mut().fail_step = true,
            Event::Wait { ms } => self.now += u64::from(ms),
            Event::Plan { prefill, eager } => {
                self.wires.borrow_mut().eager = eager;
                let depth = self.config.depth;
                let launched = self.scheduler.num_in_flight() < depth && self.plan(usize::from(prefill));
                if !launched && self.scheduler.num_in_flight() > 0 {
                    self.resolve();
                }
            }
            Event::Resolve if self.scheduler.num_in_flight() > 0 => self.resolve(),
            Event::Resolve => drop(self.plan(self.config.max_num_batched_tokens)),
        }
        self.turns += 1;
        self.check_state(self.turns);
    }

    /// I5 and I8: everything that is left finishes when the load ends, and every block comes back.
    fn drain(&mut self) {
        let unread: Vec<SeqId> =
            self.live.iter().filter(|(_, live)| live.unread).map(|(&id, _)| id).collect();
        for id in unread {
            self.live(id).unread = false;
            self.unpark(id);
        }
        for turn in 0..30_000 {
            if self.live.is_empty() && self.scheduler.num_in_flight() == 0 {
                break;
            }
            let prefill = 1 + turn % self.config.max_num_batched_tokens;
            self.happen(&Event::Plan { prefill: prefill as u16, eager: turn % 3 == 0 });
        }
        assert!(self.live.is_empty(), "I5: requests that fit alone must finish");
        self.check_nothing_is_left();
        self.seen.preemptions = self.scheduler.num_preemptions();
        let wires = self.wires.borrow();
        self.seen.failed_steps = wires.failures as u64;
        [self.seen.saves, self.seen.loads] = wires.copies.map(|copies| copies as u64);
        self.seen.compared = self.service.compared;
    }

    /// A live sequence.
    ///
    /// # Panics
    /// I3: when it is gone.
    pub fn live(&mut self, seq: SeqId) -> &mut Live {
        self.live.get_mut(&seq).expect("I3: something happened to a request that is gone")
    }

    fn find(&self, whom: Whom) -> Option<u32> {
        let found = match whom {
            Whom::Request(id) => self.requests.contains_key(&id).then_some(id),
            Whom::Any(pick) => {
                self.requests.keys().nth(usize::from(pick) % self.requests.len().max(1)).copied()
            }
        };
        pin(found)
    }

    /// Takes a sequence out of the scheduler, wherever it is.
    fn remove(&mut self, id: SeqId) {
        let live = self.live.remove(&id).expect("the simulation removes what is live");
        let before = self.pool.counts();
        let removed = self.scheduler.remove(id).expect("I3: it was live");
        let after = self.pool.counts();
        assert_eq!(removed.blocks_freed, before.owned - after.owned, "I3: the receipt tells the truth");
        assert_eq!(removed.completion_tokens, live.known - live.script.prompt_len, "I3: so many came");
        assert_eq!(removed.rows_freed, usize::from(live.place == Where::Running), "I3: it had this row");
        assert!(self.scheduler.remove(id).is_none(), "I4: a second abort finds nothing");
        self.forget(id, live.tenant);
        // Another completion may take its part over.
        self.take_notes();
    }

    pub fn forget(&mut self, id: SeqId, tenant: usize) {
        self.service.gone(id, tenant);
        self.wires.borrow_mut().fates.remove(&id);
    }

    fn abort(&mut self, request: u32) {
        self.seen.aborts_over_two_steps += u64::from(self.scheduler.num_in_flight() == MAX_IN_FLIGHT);
        let request = self.requests.remove(&request).expect("picked among the live");
        for id in request.seqs {
            self.remove(id);
        }
    }

    /// I4: an abort of what ended, or never was, changes nothing.
    fn abort_gone(&mut self, pick: u16) {
        let id = SeqId(u64::from(pick) % (self.next_seq + 2));
        if !self.live.contains_key(&id) {
            let before = self.pool.counts();
            assert!(self.scheduler.remove(id).is_none(), "I3: {id:?} is gone, and still somewhere");
            assert_eq!(self.scheduler.explain(id), None, "I3: {id:?} is gone, and still explained");
            self.scheduler.park(id);
            self.scheduler.unpark(id);
            assert_eq!(before, self.pool.counts(), "I4: an abort of nothing frees nothing");
        }
    }

    fn stop(&mut self, whom: Whom, index: u8) {
        let Some(request) = self.find(whom) else { return };
        let seqs = &self.requests[&request].seqs;
        let id = seqs[usize::from(index) % seqs.len()];
        self.remove(id);
        self.close(request, id);
    }

    /// I9: what is past its deadline is taken out at once; anything that comes for it later hits nobody.
    fn expire(&mut self) {
        let late = |request: &Request| request.deadline.is_some_and(|deadline| deadline <= self.now);
        let late: Vec<u32> =
            self.requests.iter().filter(|(_, request)| late(request)).map(|(&id, _)| id).collect();
        for request in late {
            self.abort(request);
            self.seen.expired += 1;
        }
    }

    fn set_unread(&mut self, whom: Whom, unread: bool) {
        let Some(request) = self.find(whom) else { return };
        for id in self.requests[&request].seqs.clone() {
            self.live(id).unread = unread;
            match unread {
                true => self.scheduler.park(id),
                false => self.unpark(id),
            }
        }
        self.take_notes();
    }

    fn unpark(&mut self, id: SeqId) {
        self.scheduler.unpark(id);
        let live = self.live(id);
        if live.place == Where::Parked {
            live.place = Where::Waiting;
            if !live.admitted && live.prompt_of.is_none() {
                let tenant = live.tenant;
                self.service.queue(id, tenant);
            }
        }
    }

    fn reset(&mut self) {
        let before = self.pool.counts();
        let freed = self.pool.clear_cache();
        assert_eq!((freed, 0), (before.cached, self.pool.counts().cached), "a reset frees what is cached");
        assert_eq!(self.pool.counts().owned, before.owned, "a reset takes nothing from anybody");
    }

    /// Plans and launches a step. False when nothing can be planned now.
    fn plan(&mut self, prefill: usize) -> bool {
        let (in_flight, preemptions) = (self.scheduler.num_in_flight(), self.scheduler.num_preemptions());
        let mut decode_rows = 0;
        let plan = self.scheduler.plan(|rows| {
            decode_rows = rows;
            prefill
        });
        let preempted = self.scheduler.num_preemptions() - preemptions;
        assert!(in_flight == 0 || preempted == 0, "nobody is preempted while a step is in flight");
        self.check_plan(&plan, decode_rows, prefill);
        self.take_notes();
        self.check_first(&plan);
        if plan.rows.is_empty() {
            let ready = self.live.values().any(|live| !live.unread);
            assert!(in_flight > 0 || !ready, "I5: somebody is ready, and nothing runs");
            self.seen.shortages += u64::from(in_flight > 0 && ready);
            return false;
        }
        self.seen.fed_back +=
            plan.rows.iter().filter(|row| matches!(row.input, TokenInput::Sampled(_))).count() as u64;
        for row in &plan.rows {
            self.live(row.seq).in_flight += 1;
        }
        self.flights.push_back(plan.clone());
        self.steps.launch(plan).expect("the simulated device is never lost");
        true
    }

    pub fn take_notes(&mut self) {
        let mut notes = std::mem::take(&mut self.notes);
        self.scheduler.take_notes(&mut notes);
        for note in notes.drain(..) {
            match note {
                Note::Admitted { seq, cached_tokens, resumed, .. } => {
                    self.admitted(seq, cached_tokens, resumed)
                }
                Note::Preempted { seq } => {
                    self.check_victim(seq);
                    assert!(!self.live(seq).whole, "I11: {seq:?} is whole and was preempted");
                    self.live(seq).place = Where::Waiting;
                }
                Note::Parked { seq } => {
                    self.seen.parked += 1;
                    let live = self.live(seq);
                    assert!(live.unread && live.place != Where::Parked, "parked without need");
                    live.place = Where::Parked;
                    let tenant = live.tenant;
                    self.service.unqueue(seq, tenant);
                }
            }
        }
        self.notes = notes;
    }

    fn admitted(&mut self, seq: SeqId, cached_tokens: usize, resumed: bool) {
        self.check_turn(seq);
        // Blocks that this very plan writes hold what is still to come.
        self.check_hit(seq, cached_tokens);
        let live = self.live(seq);
        assert!(live.place == Where::Waiting && !live.unread, "{seq:?} was admitted from {:?}", live.place);
        assert_eq!(resumed, live.admitted, "I6: whoever had a row before is resumed");
        live.place = Where::Running;
        live.admitted = true;
        let tenant = live.tenant;
        let size = Size { to_compute: live.known - cached_tokens, output: live.script.output().len() };
        if !resumed {
            self.service.admitted(seq, tenant, size);
        }
        self.seen.resumed += u64::from(resumed);
        self.seen.cached_tokens += cached_tokens as u64;
    }
}

/// Notes whom the event that runs has found.
pub fn pin(found: Option<u32>) -> Option<u32> {
    if let Some(request) = found {
        PINS.with_borrow_mut(|pins| pins.push((AT.get(), request)));
    }
    found
}
