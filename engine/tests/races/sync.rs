//! What `engine/src/sync.rs` is to the engine, over shuttle: each use is a point at which another thread may go on.

use std::sync::OnceLock as Cell;

pub use shuttle::{
    sync::{
        MutexGuard,
        atomic::{AtomicU64, AtomicUsize},
        mpsc,
    },
    thread,
};

/// Interleavings tried by each of two ways to choose them.
const SCHEDULES: usize = 1500;
/// Places at which a thread is interrupted by plan. Most bugs need one or two (Burckhardt et al., "A Randomized Scheduler with
/// Probabilistic Guarantees of Finding Bugs", ASPLOS 2010).
const DEPTH: usize = 3;

/// Runs a test in many interleavings of its threads. One that fails is printed with what replays it.
pub fn interleave(test: impl Fn() + Send + Sync + 'static) {
    let test = std::sync::Arc::new(test);
    let again = test.clone();
    shuttle::check_random(move || test(), SCHEDULES);
    let beside_another = move || {
        // It refuses a test with a single thread.
        let other = thread::spawn(|| ());
        again();
        other.join().unwrap();
    };
    shuttle::check_pct(beside_another, SCHEDULES, DEPTH);
}

/// Few: there are many interleavings.
pub const ROUNDS: usize = 8;

/// As parking_lot's: without poison.
#[derive(Debug, Default)]
pub struct Mutex<T>(shuttle::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap()
    }
}

/// As the standard library's. Between two uses of shuttle nothing else runs, so it only has to give way.
#[derive(Debug)]
pub struct OnceLock<T>(Cell<T>);

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        Self(Cell::new())
    }
}

impl<T> OnceLock<T> {
    pub fn get(&self) -> Option<&T> {
        thread::yield_now();
        self.0.get()
    }

    pub fn get_or_init(&self, init: impl FnOnce() -> T) -> &T {
        thread::yield_now();
        self.0.get_or_init(init)
    }
}
