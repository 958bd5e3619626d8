//! Many seeds, on all cores, and the report of the first that fails.

use std::{
    cell::{Cell, RefCell},
    fmt,
    num::NonZero,
    ops::Range,
    panic::{self, AssertUnwindSafe},
    sync::{
        Mutex, Once,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use crate::{
    scenario::Scenario,
    seen::Seen,
    shrink::shrink,
    sim::{AT, PINS, Sim},
};

/// What a simulation died of.
#[derive(Debug, Clone)]
pub struct Failure {
    pub message: String,
    /// Where in the source: two failures at one place count as the same.
    pub place: String,
    /// The event that was running.
    pub at: usize,
    /// Which requests the events happened to.
    pub pins: Vec<(usize, u32)>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event {}: {} ({})", self.at, self.message, self.place)
    }
}

/// A seed that fails.
#[derive(Debug)]
pub struct Found {
    pub seed: u64,
    pub failure: Failure,
}

thread_local! {
    /// This thread runs simulations: panics are kept and not printed.
    static IS_SIMULATING: Cell<bool> = const { Cell::new(false) };
    static LAST_PANIC: RefCell<Option<(String, String)>> = const { RefCell::new(None) };
}

fn keep_panics_of_simulations() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !IS_SIMULATING.get() {
                return print(info);
            }
            let message = info.payload_as_str().unwrap_or("?").to_owned();
            let place = info.location().map_or_else(String::new, |at| format!("{}:{}", at.file(), at.line()));
            LAST_PANIC.set(Some((message, place)));
        }));
    });
}

/// Runs a scenario; what is wrong comes back instead of a panic.
pub fn attempt(scenario: &Scenario) -> Result<Seen, Failure> {
    keep_panics_of_simulations();
    IS_SIMULATING.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(|| Sim::run(scenario)));
    IS_SIMULATING.set(false);
    result.map_err(|_| {
        let (message, place) = LAST_PANIC.take().unwrap_or_default();
        Failure { message, place, at: AT.get(), pins: PINS.take() }
    })
}

/// Runs all seeds, so many events each, on all cores. Of the seeds that fail, the first.
///
/// `prepare` is called once on each thread that runs them.
pub fn run(seeds: Range<u64>, events: usize, prepare: impl Fn() + Sync) -> Result<Seen, Found> {
    let next = AtomicU64::new(seeds.start);
    let found: Mutex<Option<Found>> = Mutex::new(None);
    let all = Mutex::new(Seen::default());
    let first_failed = AtomicU64::new(seeds.end);
    let work = || {
        prepare();
        let mut seen = Seen::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first_failed.load(Ordering::Relaxed) {
                break;
            }
            match attempt(&Scenario::from_seed(seed, events)) {
                Ok(more) => seen.add(&more),
                Err(failure) => {
                    let mut found = found.lock().unwrap();
                    if found.as_ref().is_none_or(|found| seed < found.seed) {
                        first_failed.fetch_min(seed, Ordering::Relaxed);
                        *found = Some(Found { seed, failure });
                    }
                }
            }
        }
        all.lock().unwrap().add(&seen);
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, NonZero::get) {
            scope.spawn(work);
        }
    });
    match found.into_inner().unwrap() {
        Some(found) => Err(found),
        None => Ok(all.into_inner().unwrap()),
    }
}

/// The same, and a failing seed ends in a panic that says how to replay it, and the smallest scenario that fails alike.
pub fn must_pass(seeds: Range<u64>, events: usize) -> Seen {
    run(seeds, events, || ()).unwrap_or_else(|Found { seed, failure }| {
        eprintln!("seed {seed} fails at {failure}; shrinking it");
        let (smallest, smaller) =
            shrink(Scenario::from_seed(seed, events), &failure, Duration::from_secs(60));
        panic!(
            "seed {seed} fails at {failure}\n\
             replay it:  SIM_FIRST_SEED={seed} SIM_SEEDS=1 SIM_EVENTS={events} cargo test -p tidemill-engine \
             --test scheduler_sim -- --ignored soak\n\
             the smallest scenario found ({} events) fails at {smaller}; as a test:\n\n{smallest}\n",
            smallest.events.len()
        )
    })
}
