//! Where a sequence stands, and why it waits.

use tidemill_engine::{
    ids::{SeqId, TenantId},
    scheduler::{NewSequence, Policy, Stage, WaitReason},
};

use crate::rig::{Rig, Setup, shape};

#[test]
fn in_the_batch_tokens_of_the_step_or_a_block_can_be_missing() {
    // Every block is taken, but those of the prompt are there.
    let mut rig = Rig::new(Setup { max_num_batched_tokens: 8, blocks: 4, ..Setup::default() });
    rig.add(0, 3, 9);
    rig.add(1, 10, 2);
    assert_eq!(shape(&rig.launch()), [(0, 0, 3), (1, 0, 5)]);
    rig.finish();
    assert_eq!(rig.waits_for(1), None, "nothing is in flight: it will be in the next");
    assert_eq!(shape(&rig.launch_with(0)), [(0, 3, 1)]);
    assert_eq!(rig.waits_for(0), None);
    assert_eq!(rig.waits_for(1), Some(WaitReason::Budget { max_num_batched_tokens: 8 }));
    let mut rig = Rig::new(Setup { blocks: 4, ..Setup::default() });
    rig.add(0, 7, 9);
    rig.add(1, 6, 9);
    rig.launch();
    rig.launch();
    rig.finish();
    assert_eq!(shape(&rig.launch()), [(1, 7, 1)], "no block for the older");
    rig.finish();
    assert_eq!(rig.waits_for(0), Some(WaitReason::Blocks { needed: 1, available: 0 }));
}

#[test]
fn a_queue_waits_for_blocks_or_for_its_turn() {
    let mut rig = Rig::new(Setup { blocks: 4, ..Setup::default() });
    rig.add(0, 11, 5);
    rig.launch();
    rig.add(1, 8, 2);
    rig.add(2, 1, 2);
    assert_eq!(rig.waits_for(1), Some(WaitReason::Blocks { needed: 2, available: 1 }));
    assert_eq!(rig.waits_for(2), Some(WaitReason::Turn { ahead: 1 }));
    let [running, queued] = [0, 2].map(|id| rig.scheduler.explain(SeqId(id)).unwrap());
    assert_eq!((running.ahead, running.kv_blocks, running.stage), (0, 3, Stage::Prefill));
    assert_eq!((queued.ahead, queued.kv_blocks, queued.stage), (1, 0, Stage::Queued));
    assert!(!running.is_preempted && !queued.is_preempted && !running.is_parked && !queued.is_parked);
}

#[test]
fn a_newcomer_is_behind_whoever_waits_and_counts() {
    let mut rig = Rig::new(Setup { policy: Policy::Priority, ..Setup::default() });
    let tenant = TenantId::new("t");
    assert_eq!(rig.scheduler.ahead_of_new(0, &tenant), 0);
    (0..3).for_each(|id| rig.add(id, 6, 2));
    assert_eq!(rig.scheduler.ahead_of_new(0, &tenant), 3);
    assert_eq!(rig.scheduler.ahead_of_new(-1, &tenant), 0);
}

#[test]
fn a_tenant_that_was_given_more_waits_for_fairness() {
    let mut rig = Rig::new(Setup { policy: Policy::Fair, blocks: 4, ..Setup::default() });
    let add = |rig: &mut Rig, id, tenant, prompt_len| {
        let new = rig.sequence(id, prompt_len, 5);
        rig.scheduler.add(NewSequence { tenant: TenantId::new(tenant), ..new });
    };
    add(&mut rig, 0, "rich", 11);
    rig.launch();
    add(&mut rig, 1, "poor", 8);
    rig.finish();
    add(&mut rig, 2, "rich", 1);
    assert_eq!(rig.waits_for(1), Some(WaitReason::Blocks { needed: 2, available: 1 }));
    assert_eq!(rig.waits_for(2), Some(WaitReason::Fairness { surplus: 11 + 2 }));
}

#[test]
fn whoever_was_preempted_or_parked_says_so_until_it_goes_on() {
    let mut rig = Rig::new(Setup { policy: Policy::Priority, max_num_seqs: 1, ..Setup::default() });
    let standing = |rig: &mut Rig| {
        let standing = rig.scheduler.explain(SeqId(0)).unwrap();
        (standing.is_preempted, standing.is_parked)
    };
    let new = rig.sequence(0, 6, 9);
    rig.scheduler.add(NewSequence { priority: 1, ..new });
    rig.step();
    rig.add(1, 6, 1);
    rig.launch();
    assert_eq!(standing(&mut rig), (true, false));
    rig.finish();
    rig.step();
    assert_eq!(standing(&mut rig), (false, false), "it runs again");
    rig.scheduler.park(SeqId(0));
    assert_eq!(standing(&mut rig), (false, true));
    assert_eq!(rig.waits_for(0), Some(WaitReason::Reader));
}
