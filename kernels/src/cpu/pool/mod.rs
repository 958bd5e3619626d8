//! Threads, and the one way in which ops divide their work.
//!
//! A decoder step is some sixty short parallel loops with a few microseconds between them: too short to wake a sleeping thread for each. So
//! [`Pool::enter`] opens a session: rayon's workers join it once, and watch for loops until it ends. The thread that entered leads: it
//! publishes a loop and takes part in it. Between sessions, and in a session that has had no loop for a while, the workers sleep.

mod team;

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread::ThreadId,
};

use parking_lot::Mutex;
use rayon::{ThreadPool, ThreadPoolBuilder};

use self::team::Team;

/// Nanoseconds of work that are not worth a second thread.
const WORTH_SHARING: usize = 4_000;

/// The threads of a CPU device: the caller and `threads - 1` workers.
pub(crate) struct Pool {
    workers: Option<ThreadPool>,
    threads: usize,
    team: Team,
    /// The thread that leads the session, while there is one.
    leader: Mutex<Option<ThreadId>>,
}

impl Pool {
    /// A pool of `threads`, or of as many as this process may use at once.
    ///
    /// # Errors
    /// The operating system's message, when it refuses the threads.
    pub(crate) fn new(threads: Option<usize>) -> Result<Pool, rayon::ThreadPoolBuildError> {
        let threads =
            threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1);
        let builder =
            || ThreadPoolBuilder::new().num_threads(threads - 1).thread_name(|i| format!("cpu-{i}"));
        let workers = if threads > 1 { Some(builder().build()?) } else { None };
        Ok(Pool { workers, threads, team: Team::default(), leader: Mutex::new(None) })
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f` with all workers at hand for [`Pool::for_each`].
    pub(crate) fn enter<T>(&self, f: impl FnOnce() -> T) -> T {
        let Some(workers) = &self.workers else { return f() };
        {
            let mut leader = self.leader.lock();
            if leader.is_some() {
                // Nested in this thread's own session, or beside that of another thread, whose workers are not ours.
                drop(leader);
                return f();
            }
            *leader = Some(std::thread::current().id());
        }
        let _free = OnDrop(|| *self.leader.lock() = None);
        self.team.open();
        workers.in_place_scope(|scope| {
            let _end = OnDrop(|| self.team.end());
            for _ in 1..self.threads {
                scope.spawn(|_| self.team.help());
            }
            f()
        })
    }

    /// Calls `f(0)`, …, `f(tasks - 1)`, each once, on any threads, and returns when all are done.
    ///
    /// Every thread takes the next number as it becomes free, so that one that is disturbed does less. `nanos` is what all tasks
    /// would cost one thread, roughly: too little work is done at once by the caller.
    pub(crate) fn for_each(&self, tasks: usize, nanos: usize, f: impl Fn(usize) + Sync) {
        if tasks <= 1 || nanos < WORTH_SHARING || self.threads == 1 {
            (0..tasks).for_each(f);
            return;
        }
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= tasks {
                    return;
                }
                f(i);
            }
        };
        let leader = *self.leader.lock();
        if leader == Some(std::thread::current().id()) {
            self.team.run(&work);
        } else if leader.is_some() {
            work();
        } else {
            self.enter(|| {
                if *self.leader.lock() == Some(std::thread::current().id()) {
                    self.team.run(&work)
                } else {
                    work()
                }
            });
        }
    }
}

/// Runs a closure when it goes out of scope, also by a panic.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// A pointer that tasks of one [`Pool::for_each`] share, each writing to places of its own.
pub(crate) struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: it is only an address; those who dereference it say why their places are disjoint.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Shared(slice.as_mut_ptr())
    }

    /// The address of element `i`.
    ///
    /// # Safety
    /// `i` is at most the length of the slice.
    #[inline(always)]
    pub(crate) unsafe fn at(self, i: usize) -> *mut T {
        // SAFETY: inside the slice, or one past it, by the caller's word.
        unsafe { self.0.add(i) }
    }

    /// Elements `i..i + len`.
    ///
    /// # Safety
    /// They lie in the slice, which outlives `'a`, and no one else touches them meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn slice<'a>(self, i: usize, len: usize) -> &'a mut [T] {
        // SAFETY: by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(i), len) }
    }
}

#[cfg(test)]
mod tests;
