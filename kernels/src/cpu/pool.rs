//! Threads: one rayon pool per device, and the one way in which ops divide their work.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Nanoseconds of work that are not worth a second thread.
const WORTH_SHARING: usize = 8_000;

/// The threads of a CPU device. They sleep while there is no work.
pub(crate) struct Pool {
    pool: ThreadPool,
    threads: usize,
}

impl Pool {
    /// A pool of `threads`, or of as many as this process may use at once.
    ///
    /// # Errors
    /// The operating system's message, when it refuses the threads.
    pub(crate) fn new(threads: Option<usize>) -> Result<Pool, rayon::ThreadPoolBuildError> {
        let threads =
            threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1);
        let pool =
            ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("cpu-{i}")).build()?;
        Ok(Pool { pool, threads })
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f` on a thread of the pool, where [`Pool::for_each`] costs least.
    pub(crate) fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        if self.threads == 1 { f() } else { self.pool.install(f) }
    }

    /// Calls `f(0)`, …, `f(tasks - 1)`, each once, on any threads, and returns when all are done.
    ///
    /// Every thread takes the next number as it becomes free, so that one that is disturbed does less. `nanos` is what all tasks
    /// would cost one thread, roughly: too little work is done at once by the caller, since waking another costs microseconds.
    pub(crate) fn for_each(&self, tasks: usize, nanos: usize, f: impl Fn(usize) + Sync) {
        let workers = self.threads.min(tasks);
        if workers <= 1 || nanos < WORTH_SHARING {
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
        if self.pool.current_thread_index().is_some() {
            fan_out(workers, &work);
        } else {
            self.pool.install(|| fan_out(workers, &work));
        }
    }
}

/// Runs `work` `n` times, as far as there are idle threads at the same time.
fn fan_out(n: usize, work: &(impl Fn() + Sync)) {
    if n == 1 {
        work();
    } else {
        rayon::join(|| fan_out(n - n / 2, work), || fan_out(n / 2, work));
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
