//! A simulation as data: a configuration and a list of events, made from a seed, printed as Rust, run and shrunk.

use std::fmt::{self, Debug};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tidemill_engine::{
    Pooling,
    scheduler::{MAX_IN_FLIGHT, Policy},
};

use crate::model::{Fate, mix};

const POOLINGS: [Pooling; 3] = [Pooling::Last, Pooling::Mean, Pooling::Cls];

/// Tenants of a simulation.
pub const TENANTS: usize = 4;
/// Adapters of a simulation.
pub const ADAPTERS: u8 = 4;

/// The machine and its scheduler.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Of whatever is drawn beside the events.
    pub key: u64,
    pub block_size: usize,
    pub blocks: usize,
    pub host_blocks: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub long_prefill_token_threshold: usize,
    pub policy: Policy,
    /// Of each tenant, in the fair queue.
    pub weights: [u32; TENANTS],
    pub caching: bool,
    /// Steps that are planned and not resolved, at most.
    pub depth: usize,
    /// Sequences that are live at the same time, at most: beyond that, arrivals are refused.
    pub max_live: usize,
    /// Different adapters in the batch, at most; 0: requests have none.
    pub max_loras: usize,
}

/// What a request is.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrival {
    /// Names the request; no other has it.
    pub id: u32,
    /// Prompts of a family begin alike.
    pub family: u8,
    /// Tokens of the prompt that the family shares.
    pub shared: u16,
    /// Tokens behind them that nobody shares.
    pub tail: u16,
    /// Goes on from what an ended request read and wrote.
    pub follows: Option<Whom>,
    /// Completions.
    pub n: u8,
    pub max_tokens: u16,
    pub min_tokens: u16,
    pub ignore_eos: bool,
    pub penalties: bool,
    pub prompt_logprobs: bool,
    /// It gives an embedding: `max_tokens` and what else is said of tokens mean nothing.
    pub pooling: Option<Pooling>,
    /// Its prompt is computed in one step, where it gives an embedding and no step is too small.
    pub whole: bool,
    /// Its tokens are constrained.
    pub form: bool,
    pub priority: i8,
    pub tenant: u8,
    /// Requests of different salts share nothing.
    pub salt: u8,
    /// 0: none.
    pub adapter: u8,
    /// What it may take, in simulated milliseconds.
    pub patience: Option<u16>,
    pub fate: Fate,
}

impl Default for Arrival {
    fn default() -> Self {
        Self {
            id: 0,
            family: 0,
            shared: 0,
            tail: 1,
            follows: None,
            n: 1,
            max_tokens: 1,
            min_tokens: 0,
            ignore_eos: true,
            penalties: false,
            prompt_logprobs: false,
            pooling: None,
            whole: false,
            form: false,
            priority: 0,
            tenant: 0,
            salt: 0,
            adapter: 0,
            patience: None,
            fate: Fate::Healthy,
        }
    }
}

/// A request that something happens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whom {
    /// One of those that are there at that moment.
    Any(u16),
    /// This one, if it is there.
    Request(u32),
}

/// Something that happens. Whatever it happens to may not be there, so any part of a list of events is a list of events.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Arrive(Arrival),
    /// A request is aborted, in whatever state it is.
    Abort(Whom),
    /// A sequence that ended or never was is aborted.
    AbortGone(u16),
    /// One completion of a request ends by a stop string.
    Stop(Whom, u8),
    /// The client stops reading.
    Park(Whom),
    /// The client reads again.
    Unpark(Whom),
    /// The prefix cache is emptied.
    Reset,
    /// The next step of several rows cannot be launched.
    FailLaunch,
    /// The next step of several rows that is launched fails.
    FailStep,
    /// Time passes, in milliseconds.
    Wait {
        ms: u16,
    },
    /// A step is planned, with so many tokens for prompts; where none can be, one is resolved. `eager`: the device computes it at once.
    Plan {
        prefill: u16,
        eager: bool,
    },
    /// The oldest step is resolved; where none is in flight, one is planned.
    Resolve,
}

/// A simulation.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    pub config: Config,
    pub events: Vec<Event>,
}

impl Scenario {
    /// Everything about it follows from the seed; a longer one begins like a shorter one.
    pub fn from_seed(seed: u64, events: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let config = Config::random(&mut rng);
        let mood = Mood::random(&mut rng);
        let mut requests = 0;
        let events = (0..events).map(|at| {
            let mut event = mood.event(&config, &mut rng);
            if let Event::Arrive(arrival) = &mut event {
                arrival.id = requests;
                arrival.tenant = mood.tenant(&config, at, arrival.tenant);
                requests += 1;
            }
            event
        });
        let events = events.collect();
        Self { config, events }
    }
}

impl Scenario {
    /// Names the requests that things happened to when it ran: other events can then be left out, and it still happens to these.
    pub fn pin(&mut self, pins: &[(usize, u32)]) {
        for &(at, request) in pins {
            match self.events.get_mut(at) {
                Some(Event::Arrive(arrival)) => arrival.follows = Some(Whom::Request(request)),
                Some(Event::Abort(whom) | Event::Stop(whom, _) | Event::Park(whom) | Event::Unpark(whom)) => {
                    *whom = Whom::Request(request)
                }
                _ => {}
            }
        }
    }
}

impl Config {
    fn random(rng: &mut StdRng) -> Self {
        let block_size = rng.random_range(1..=8);
        let max_num_seqs = rng.random_range(1..=8);
        let max_num_batched_tokens = max_num_seqs + rng.random_range(0..=40);
        Self {
            key: rng.random(),
            block_size,
            blocks: if rng.random_bool(0.1) { rng.random_range(1..=4) } else { rng.random_range(5..=40) },
            host_blocks: if rng.random_bool(0.4) { rng.random_range(1..=12) } else { 0 },
            max_num_seqs,
            max_num_batched_tokens,
            long_prefill_token_threshold: if rng.random_bool(0.5) {
                rng.random_range(1..=max_num_batched_tokens)
            } else {
                max_num_batched_tokens
            },
            policy: [Policy::Fcfs, Policy::Priority, Policy::Fair][rng.random_range(0..3)],
            weights: std::array::from_fn(|_| if rng.random_bool(0.5) { 1 } else { rng.random_range(1..=5) }),
            caching: rng.random_bool(0.8),
            depth: if rng.random_bool(0.15) { 1 } else { MAX_IN_FLIGHT },
            max_live: rng.random_range(4..=24),
            max_loras: rng.random_range(0..=3),
        }
        .with_fair_adapters()
    }

    /// Whoever waits for a slot is overtaken, also by tenants that were given more. The bound of the fair queue holds where nobody does.
    fn with_fair_adapters(mut self) -> Self {
        if self.policy == Policy::Fair && self.max_loras > 0 {
            self.max_loras = usize::from(ADAPTERS);
        }
        self
    }
}

/// How often what happens in one simulation.
struct Mood {
    arrivals: f64,
    aborts: f64,
    parks: f64,
    failures: f64,
    /// Prompts that nobody shares.
    loners: f64,
    tight_budgets: bool,
    /// Requests are small beside the pool.
    small: bool,
    /// Events after which other tenants are busy; none: all are, always.
    phase: Option<usize>,
}

impl Mood {
    fn random(rng: &mut StdRng) -> Self {
        let often = |rng: &mut StdRng, chance: f64, rates: [f64; 2]| {
            if rng.random_bool(chance) { rng.random_range(rates[0]..rates[1]) } else { 0.0 }
        };
        Self {
            arrivals: rng.random_range(0.02..0.25),
            aborts: often(rng, 0.7, [0.005, 0.05]),
            parks: often(rng, 0.5, [0.005, 0.05]),
            failures: often(rng, 0.3, [0.005, 0.05]),
            loners: rng.random_range(0.0..0.8),
            tight_budgets: rng.random_bool(0.3),
            small: rng.random_bool(0.5),
            phase: rng.random_bool(0.5).then(|| rng.random_range(100..1000)),
        }
    }

    /// The tenant of a request: one of those that are busy now.
    fn tenant(&self, config: &Config, at: usize, drawn: u8) -> u8 {
        let busy = self.phase.map_or(0, |phase| mix(config.key ^ (at / phase) as u64) as u8 & 0xF);
        let chosen =
            (0..TENANTS as u8).filter(|tenant| busy >> tenant & 1 == 1).cycle().nth(usize::from(drawn));
        chosen.unwrap_or(drawn)
    }

    fn event(&self, config: &Config, rng: &mut StdRng) -> Event {
        let mut dice = rng.random_range(0.0..1.0);
        let mut falls = |chance: f64| {
            dice -= chance;
            dice < 0.0
        };
        if falls(self.arrivals) {
            return Event::Arrive(self.arrival(config, rng));
        }
        let pick = rng.random_range(0..1000);
        let whom = Whom::Any(pick);
        if falls(self.aborts) {
            return if rng.random_bool(0.7) {
                Event::Abort(whom)
            } else {
                Event::Stop(whom, rng.random_range(0..3))
            };
        }
        if falls(self.aborts * 0.2) {
            return Event::AbortGone(pick);
        }
        if falls(self.parks) {
            return Event::Park(whom);
        }
        if falls(self.parks * 2.0) {
            return Event::Unpark(whom);
        }
        if falls(self.failures) {
            return if rng.random_bool(0.5) { Event::FailLaunch } else { Event::FailStep };
        }
        if falls(0.001) {
            return Event::Reset;
        }
        if falls(0.01) {
            return Event::Wait { ms: rng.random_range(1..=60) };
        }
        if !rng.random_bool(0.55) {
            return Event::Resolve;
        }
        let prefill = if self.tight_budgets {
            rng.random_range(1..=config.max_num_batched_tokens)
        } else {
            config.max_num_batched_tokens
        };
        Event::Plan { prefill: prefill as u16, eager: rng.random_bool(0.5) }
    }

    fn arrival(&self, config: &Config, rng: &mut StdRng) -> Arrival {
        // Most requests fit into the pool; a few do not, and are to be refused.
        let capacity = config.blocks * config.block_size;
        let reach = if self.small { capacity.div_ceil(3) } else { capacity }.clamp(3, 70);
        let total = if rng.random_bool(0.02) { capacity + 2 } else { rng.random_range(2..=reach + 1) };
        let max_tokens = rng.random_range(1..=(total - 1).min(30)) as u16;
        let prompt = (total as u16 - max_tokens).min(60);
        let shared = if rng.random_bool(self.loners) { 0 } else { rng.random_range(0..=prompt) };
        let limit = rng.random_range(1..=prompt + max_tokens);
        Arrival {
            id: 0,
            family: rng.random_range(0..5),
            shared,
            tail: prompt - shared,
            follows: rng.random_bool(0.2).then(|| Whom::Any(rng.random_range(0..4))),
            n: if rng.random_bool(0.2) { rng.random_range(2..=3) } else { 1 },
            max_tokens,
            min_tokens: if rng.random_bool(0.3) { rng.random_range(0..=max_tokens) } else { 0 },
            ignore_eos: rng.random_bool(0.3),
            penalties: rng.random_bool(0.15),
            prompt_logprobs: rng.random_bool(0.15),
            pooling: rng.random_bool(0.15).then(|| POOLINGS[rng.random_range(0..3)]),
            whole: rng.random_bool(0.5),
            form: rng.random_bool(0.25),
            priority: if config.policy == Policy::Priority { rng.random_range(-1..=2) } else { 0 },
            // The first tenant floods.
            tenant: if rng.random_bool(0.4) { 0 } else { rng.random_range(0..TENANTS as u8) },
            salt: u8::from(rng.random_bool(0.2)),
            adapter: if config.max_loras > 0 && rng.random_bool(0.5) {
                rng.random_range(1..=ADAPTERS)
            } else {
                0
            },
            patience: rng.random_bool(0.1).then(|| rng.random_range(1..=200)),
            fate: match rng.random_range(0..40) {
                0 => Fate::Poison(limit),
                1 => Fate::NotFinite(limit),
                _ => Fate::Healthy,
            },
        }
    }
}

/// A value as Rust.
fn with_paths(value: &dyn Debug) -> String {
    format!("{value:?}").replace("Any(", "Whom::Any(").replace("Request(", "Whom::Request(")
}

/// Prints a scenario as the Rust that replays it.
impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = format!("{:?}", self.config).replace("policy: ", "policy: Policy::");
        writeln!(f, "replay(")?;
        writeln!(f, "    {config},")?;
        writeln!(f, "    [")?;
        for event in &self.events {
            match event {
                Event::Arrive(arrival) => writeln!(f, "        Event::Arrive({}),", arrival.code())?,
                event => writeln!(f, "        Event::{},", with_paths(event))?,
            }
        }
        writeln!(f, "    ],")?;
        write!(f, ");")
    }
}

impl Arrival {
    /// As Rust, without what is as ever.
    fn code(&self) -> String {
        let plain = Self::default();
        let mut fields = Vec::new();
        let mut field = |name: &str, value: &dyn Debug, plain: &dyn Debug| {
            let value = with_paths(&value);
            if value != with_paths(&plain) {
                fields.push(format!("{name}: {value}"));
            }
        };
        macro_rules! fields {
            ($($name:ident)*) => { $(field(stringify!($name), &self.$name, &plain.$name);)* };
        }
        fields!(id family shared tail follows n max_tokens min_tokens ignore_eos penalties prompt_logprobs form);
        fields!(whole priority tenant salt adapter patience);
        if let Some(pooling) = self.pooling {
            fields.push(format!("pooling: Some(Pooling::{pooling:?})"));
        }
        if self.fate != plain.fate {
            fields.push(format!("fate: Fate::{:?}", self.fate));
        }
        format!(
            "Arrival {{ {}{}..Arrival::default() }}",
            fields.join(", "),
            if fields.is_empty() { "" } else { ", " }
        )
    }
}
