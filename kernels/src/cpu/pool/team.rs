//! A leader that publishes work, and helpers that watch for it.

use std::{
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// How long a helper watches before it sleeps: longer than what lies between two loops of a step.
const WATCH: Duration = Duration::from_micros(150);

/// In [`Team::gate`]: the work may be joined.
const OPEN: u64 = 1 << 31;
/// In [`Team::gate`]: how many helpers are at work.
const INSIDE: u64 = OPEN - 1;
/// In [`Team::gate`]: the number of the work.
const NUMBER: u64 = 1 << 32;

/// Work, with the type of its closure forgotten.
#[derive(Clone, Copy)]
struct Work {
    data: *const (),
    call: unsafe fn(*const ()),
}

/// See the module.
pub(super) struct Team {
    /// Number of the present work, whether it may be joined, and how many helpers are inside.
    gate: AtomicU64,
    /// Written by the leader while the gate is shut and nobody is inside; read by helpers inside.
    work: UnsafeCell<Work>,
    ended: AtomicBool,
    panicked: AtomicBool,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    alarm: Condvar,
}

// SAFETY: `work` is written and read as its comment says, ordered by `gate`; the closure behind it is `Sync` (see `run`).
unsafe impl Sync for Team {}
// SAFETY: as above.
unsafe impl Send for Team {}

impl Default for Team {
    fn default() -> Self {
        Team {
            gate: AtomicU64::new(0),
            work: UnsafeCell::new(Work { data: std::ptr::null(), call: |_| {} }),
            ended: AtomicBool::new(true),
            panicked: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            bed: Mutex::new(()),
            alarm: Condvar::new(),
        }
    }
}

impl Team {
    /// Begins a session. Only its leader may call `run` and `end`.
    pub(super) fn open(&self) {
        self.ended.store(false, Ordering::SeqCst);
    }

    /// Ends the session: helpers return.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Calls `work` here, and at the same time in every helper that is awake in time. Returns when all calls have.
    pub(super) fn run<F: Fn() + Sync>(&self, work: &F) {
        unsafe fn call<F: Fn()>(data: *const ()) {
            // SAFETY: `data` is the `&F` below, which outlives the open gate.
            unsafe { (*data.cast::<F>())() }
        }
        let gate = self.gate.load(Ordering::Relaxed);
        if gate & (OPEN | INSIDE) != 0 {
            // Work within work: the helpers are busy.
            return work();
        }
        // SAFETY: the gate is shut, nobody is inside, and only the leader opens it.
        unsafe { *self.work.get() = Work { data: std::ptr::from_ref(work).cast(), call: call::<F> } };
        self.gate.store(gate.wrapping_add(NUMBER) | OPEN, Ordering::SeqCst);
        self.wake();
        let shut = super::OnDrop(|| self.shut());
        work();
        drop(shut);
        if self.panicked.swap(false, Ordering::Relaxed) {
            resume_unwind(Box::new("a task panicked in a worker thread"));
        }
    }

    /// Lets nobody in any more, and waits for those who are inside.
    fn shut(&self) {
        self.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.gate.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            // A helper that lost its core gets ours.
            if spins % 4096 == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }

    /// Takes part in the work of the session until it ends.
    pub(super) fn help(&self) {
        let mut done = self.gate.load(Ordering::Relaxed) / NUMBER;
        if self.gate.load(Ordering::Acquire) & OPEN != 0 {
            done = done.wrapping_sub(1);
        }
        let mut since = Instant::now();
        let mut spins = 0_u32;
        while !self.ended.load(Ordering::SeqCst) {
            if self.join(&mut done) {
                (since, spins) = (Instant::now(), 0);
                continue;
            }
            spins += 1;
            if spins.is_multiple_of(64) && since.elapsed() > WATCH {
                self.sleep(done);
                since = Instant::now();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// Does the present work, if it is open and not number `done`.
    fn join(&self, done: &mut u64) -> bool {
        let gate = self.gate.load(Ordering::SeqCst);
        if gate & OPEN == 0 || gate / NUMBER == *done {
            return false;
        }
        if self.gate.compare_exchange(gate, gate + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            *done = gate / NUMBER;
            // SAFETY: we are inside, so the leader neither rewrites `work` nor lets its closure go.
            let call = || unsafe {
                let work = *self.work.get();
                (work.call)(work.data);
            };
            if catch_unwind(AssertUnwindSafe(call)).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.gate.fetch_sub(1, Ordering::Release);
        }
        true
    }

    /// Sleeps until there is work that is not number `done`, or the session ends.
    fn sleep(&self, done: u64) {
        let mut bed = self.bed.lock();
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        loop {
            // After the count of sleepers went up: whoever opens the gate now sees the count.
            let gate = self.gate.load(Ordering::SeqCst);
            let work = gate & OPEN != 0 && gate / NUMBER != done;
            if work || self.ended.load(Ordering::SeqCst) {
                break;
            }
            self.alarm.wait(&mut bed);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _bed = self.bed.lock();
            self.alarm.notify_all();
        }
    }
}
