//! A warm scheduler allocates nothing: an allocator's lock or page fault in one step of thousands would be a stutter of all streams.

#[path = "../benches/scheduler/rig.rs"]
#[expect(dead_code, reason = "the benchmark uses all of it")]
mod rig;

use allocation_counter::measure;
use rig::{BLOCK_SIZE, MAX_NUM_SEQS, Rig};
use tidemill_engine::scheduler::Policy;

/// Each row fills more than 60 blocks in so many.
const STEPS: usize = 1000;
/// Steps before the count begins: both plans in flight have had all rows.
const WARM_UP: usize = 4 * BLOCK_SIZE;

fn allocates_nothing(policy: Policy) {
    let mut rig = Rig::decoding(policy, MAX_NUM_SEQS, 1024, STEPS + WARM_UP);
    for _ in 0..WARM_UP {
        rig.step();
    }
    let (mut planning, mut resolving, mut tokens) = (0, 0, 0);
    for _ in 0..STEPS {
        planning += measure(|| rig.plan()).count_total;
        // The results are the runner's: they are made outside of the count.
        let results = rig.results(2).expect("two steps are in flight");
        resolving += measure(|| tokens += rig.resolve(results)).count_total;
    }
    assert_eq!(tokens, STEPS * MAX_NUM_SEQS, "every row has generated in every step");
    assert_eq!(
        (planning, resolving),
        (0, 0),
        "allocations while planning and resolving {STEPS} steps, {policy:?}"
    );
}

#[test]
fn a_warm_scheduler_allocates_nothing_first_come_first_served() {
    allocates_nothing(Policy::Fcfs);
}

#[test]
fn a_warm_scheduler_allocates_nothing_by_priority() {
    allocates_nothing(Policy::Priority);
}

#[test]
fn a_warm_scheduler_allocates_nothing_by_fair_shares() {
    allocates_nothing(Policy::Fair);
}
