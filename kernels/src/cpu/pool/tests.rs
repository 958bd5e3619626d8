use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::*;

/// Enough work, in the pool's eyes, to be shared.
const MUCH: usize = 1 << 20;

#[test]
fn every_task_runs_once() {
    for threads in [1, 2, 3, 5] {
        let pool = Pool::new(Some(threads)).expect("threads");
        let check = |tasks: usize| {
            let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
            pool.for_each(tasks, MUCH, |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        };
        (0..20).for_each(check);
        for _ in 0..50 {
            pool.enter(|| (0..200).for_each(|i| check(i % 7)));
        }
    }
}

#[test]
fn helpers_take_part_and_wake_from_sleep() {
    let pool = Pool::new(Some(2)).expect("threads");
    pool.enter(|| {
        for pause in [0, 1, 20] {
            std::thread::sleep(std::time::Duration::from_millis(pause));
            let together = AtomicUsize::new(0);
            // Two tasks that wait for each other: only two threads get through.
            pool.for_each(2, MUCH, |_| {
                together.fetch_add(1, Ordering::SeqCst);
                while together.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
            });
        }
    });
}

#[test]
fn work_within_work_and_sessions_within_sessions_are_done_in_place() {
    let pool = Pool::new(Some(3)).expect("threads");
    let count = AtomicUsize::new(0);
    pool.enter(|| {
        pool.enter(|| {
            pool.for_each(10, MUCH, |_| {
                pool.for_each(10, MUCH, |_| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
            });
        });
    });
    assert_eq!(count.into_inner(), 100);
}

#[test]
fn two_threads_may_use_one_pool() {
    let pool = Pool::new(Some(2)).expect("threads");
    let count = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..200 {
                    pool.for_each(5, MUCH, |_| {
                        count.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(count.into_inner(), 3000);
}

#[test]
fn a_panic_in_a_task_comes_back_and_the_pool_lives_on() {
    let pool = Pool::new(Some(3)).expect("threads");
    for bad in [0, 50, 99] {
        let run = || pool.for_each(100, MUCH, |i| assert!(i != bad, "task {i}"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.enter(run))).is_err());
    }
    let count = AtomicUsize::new(0);
    pool.for_each(10, MUCH, |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(count.into_inner(), 10);
}
