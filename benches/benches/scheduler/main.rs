//! What the scheduler costs per step.
//!
//! The budget: planning a step and taking one in takes less than 100 µs together for 256 rows. That is hidden behind the step that
//! runs meanwhile as long as a step takes longer, and the quickest decode steps of small models on large GPUs take about a
//! millisecond. `benches/tests/scheduler_allocations.rs` holds the other half of the promise, that it allocates nothing.

// The macros of criterion make functions without documentation.
#![allow(missing_docs)]

mod rig;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{Criterion, criterion_group, criterion_main};
use rig::{BLOCK_SIZE, MAX_NUM_SEQS, Rig, prompt};
use tidemill_engine::{ids::SeqId, scheduler::Policy};

/// Tokens of context of each row.
const CONTEXT: usize = 1024;
/// Steps after which the rows begin anew, so that the contexts stay about as long.
const STEPS: u64 = 256;
/// Tokens of the prefix that is warm.
const PREFIX: usize = 2048;
/// Requests in the queue.
const WAITING: u64 = 5000;

/// The time that `of` takes.
fn time<T>(of: impl FnOnce() -> T) -> Duration {
    let start = Instant::now();
    black_box(of());
    start.elapsed()
}

/// Plans a step and takes the one before it in; the making of the results in between does not count.
fn timed_step(rig: &mut Rig) -> Duration {
    let planning = time(|| rig.plan());
    let Some(results) = rig.results(2) else { return planning };
    planning + time(|| rig.resolve(results))
}

/// The time of `iters` steps, with a fresh rig every [`STEPS`].
fn steps(iters: u64, rig: impl Fn() -> Rig, mut step: impl FnMut(&mut Rig, u64) -> Duration) -> Duration {
    let mut total = Duration::ZERO;
    for first in (0..iters).step_by(STEPS as usize) {
        let mut rig = rig();
        total += (0..STEPS.min(iters - first)).map(|at| step(&mut rig, at)).sum::<Duration>();
    }
    total
}

fn decode(c: &mut Criterion) {
    for rows in [1, 64, 256] {
        let rig = || Rig::decoding(Policy::Fcfs, rows, CONTEXT, STEPS as usize);
        c.bench_function(&format!("step/decode rows={rows}"), |b| {
            b.iter_custom(|iters| steps(iters, rig, |rig, _| timed_step(rig)));
        });
    }
    let rig = || Rig::decoding(Policy::Fair, 256, CONTEXT, STEPS as usize);
    c.bench_function("step/decode rows=256 fair", |b| {
        b.iter_custom(|iters| steps(iters, rig, |rig, _| timed_step(rig)));
    });
}

/// 255 rows that decode, and as much of a prompt as a step holds beside them.
fn chunk(c: &mut Criterion) {
    let rig = || Rig::decoding(Policy::Fcfs, MAX_NUM_SEQS - 1, CONTEXT, STEPS as usize);
    c.bench_function("step/decode rows=255 and a chunk of 1793", |b| {
        b.iter_custom(|iters| {
            let (mut number, mut long) = (1 << 20, None::<SeqId>);
            steps(iters, rig, |rig, at| {
                if at % 8 == 0 {
                    // The one before has chunks left; the admission of the new one is not measured.
                    long.filter(|_| at > 0).map(|id| rig.scheduler.remove(id));
                    number += 1;
                    long = Some(rig.arrive(prompt(number, 10 * 1793), 1, 0));
                    rig.step();
                }
                timed_step(rig)
            })
        });
    });
}

/// A request from the queue into the batch.
fn admission(c: &mut Criterion) {
    for (name, warm) in [("warm", true), ("cold", false)] {
        c.bench_function(&format!("admission/{name} prompt={PREFIX}"), |b| {
            b.iter_custom(|iters| {
                let mut rig = Rig::new(Policy::Fcfs, 4 * PREFIX / BLOCK_SIZE);
                (0..iters)
                    .map(|number| {
                        let number = if warm { 0 } else { number };
                        let new = rig.request(prompt(number, PREFIX + 1), 2, 0);
                        let id = new.id;
                        let took = time(|| {
                            rig.scheduler.add(new);
                            rig.plan();
                        });
                        rig.settle();
                        rig.scheduler.remove(id);
                        took
                    })
                    .sum()
            });
        });
    }
}

fn prefix_match(c: &mut Criterion) {
    c.bench_function(&format!("prefix/match and release tokens={PREFIX}"), |b| {
        b.iter_custom(|iters| {
            let rig = Rig::new(Policy::Fcfs, 4 * PREFIX / BLOCK_SIZE);
            let tokens = prompt(0, PREFIX);
            let mut first = rig.pool.table(rig.root);
            assert!(first.reserve(PREFIX), "the pool is empty");
            first.register(&tokens);
            time(|| {
                for _ in 0..iters {
                    // With the hashing of its tokens: each table is a new request's.
                    let mut table = rig.pool.table(rig.root);
                    assert_eq!(black_box(table.match_prefix(&tokens, PREFIX)), PREFIX);
                }
            })
        });
    });
}

/// A full batch and a long queue: in each step one request arrives, one ends and one is admitted.
fn queue(c: &mut Criterion) {
    for policy in [Policy::Fcfs, Policy::Priority, Policy::Fair] {
        c.bench_function(&format!("step/rows=256 waiting={WAITING} {policy:?}").to_lowercase(), |b| {
            b.iter_custom(|iters| {
                let rig = || {
                    let mut rig = Rig::decoding(policy, MAX_NUM_SEQS, CONTEXT, STEPS as usize);
                    for number in 0..WAITING {
                        rig.arrive(prompt((1 << 20) + number, 64), 8, number);
                    }
                    rig
                };
                steps(iters, rig, |rig, at| {
                    let new = rig.request(prompt((1 << 30) + at, 64), 8, at);
                    time(|| {
                        rig.scheduler.add(new);
                        // The first ids are those of the rows that decode.
                        rig.scheduler.remove(SeqId(at + 1));
                    }) + timed_step(rig)
                })
            });
        });
    }
}

criterion_group! {
    name = scheduler;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = decode, chunk, admission, prefix_match, queue
}
criterion_main!(scheduler);
