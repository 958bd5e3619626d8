//! Who is served when, what is found in the prefix cache, and what parking gives up.

use std::sync::Arc;

use tidemill_engine::{
    ids::{SeqId, TenantId, TokenId},
    kv::KvEvent,
    sampling::Sampling,
    scheduler::{NewSequence, Note, Policy, WaitReason},
};

use crate::rig::{BLOCK, Rig, Setup, shape};

fn add_with_priority(rig: &mut Rig, id: u64, priority: i32) {
    let new = rig.sequence(id, 6, 20);
    rig.scheduler.add(NewSequence { priority, ..new });
}

fn add_for(rig: &mut Rig, id: u64, tenant: &str, prompt_len: usize) {
    let new = rig.sequence(id, prompt_len, 1);
    rig.scheduler.add(NewSequence { tenant: TenantId::new(tenant), ..new });
}

fn ids(admitted: Vec<(u64, usize)>) -> Vec<u64> {
    admitted.into_iter().map(|(id, _)| id).collect()
}

#[test]
fn lower_values_of_priority_go_first_and_equals_by_age() {
    let mut rig = Rig::new(Setup { policy: Policy::Priority, max_num_seqs: 1, ..Setup::default() });
    for (id, priority) in [(0, 5), (1, -1), (2, 5), (3, 0), (4, -1)] {
        add_with_priority(&mut rig, id, priority);
    }
    rig.run();
    assert_eq!(ids(rig.admitted()), [1, 4, 3, 0, 2]);
}

#[test]
fn priorities_mean_nothing_under_other_policies() {
    let mut rig = Rig::new(Setup { max_num_seqs: 1, ..Setup::default() });
    add_with_priority(&mut rig, 0, 5);
    add_with_priority(&mut rig, 1, -1);
    rig.run();
    assert_eq!(ids(rig.admitted()), [0, 1]);
}

#[test]
fn a_better_priority_takes_the_row_of_the_youngest_of_the_worst_once_nothing_is_in_flight() {
    let mut rig = Rig::new(Setup { policy: Policy::Priority, max_num_seqs: 3, ..Setup::default() });
    for (id, priority) in [(0, 1), (1, 2), (2, 2)] {
        add_with_priority(&mut rig, id, priority);
    }
    rig.launch();
    add_with_priority(&mut rig, 3, 0);
    rig.launch();
    assert_eq!(rig.scheduler.num_preemptions(), 0, "never in flight");
    rig.finish();
    assert!(rig.launch().rows.is_empty(), "the pipeline is let run empty for it");
    rig.finish();
    rig.admitted();
    assert!(shape(&rig.launch()).contains(&(3, 0, 6)));
    assert_eq!([0, 1, 2].map(|id| rig.preemptions(id)), [0, 0, 1]);
}

#[test]
fn an_equal_priority_takes_nobodys_row() {
    let mut rig = Rig::new(Setup { policy: Policy::Priority, max_num_seqs: 1, ..Setup::default() });
    add_with_priority(&mut rig, 0, 1);
    rig.step();
    add_with_priority(&mut rig, 1, 1);
    rig.step();
    assert_eq!(rig.scheduler.num_preemptions(), 0);
    assert_eq!(rig.waits_for(1), Some(WaitReason::Rows { max_num_seqs: 1 }));
}

#[test]
fn the_pipeline_goes_on_where_priorities_have_nothing_to_gain() {
    // For an equal; and for a better one that finds a row and blocks anyway, but no token of this step.
    for (max_num_seqs, priority) in [(1, 1), (2, 0)] {
        let setup =
            Setup { policy: Policy::Priority, max_num_seqs, max_num_batched_tokens: 8, ..Setup::default() };
        let mut rig = Rig::new(setup);
        add_with_priority(&mut rig, 0, 1);
        rig.launch();
        add_with_priority(&mut rig, 1, priority);
        assert!(shape(&rig.launch()).contains(&(0, 6, 1)));
        assert_eq!(rig.scheduler.num_preemptions(), 0);
    }
}

#[test]
fn a_better_priority_takes_blocks_that_it_needs() {
    let mut rig = Rig::new(Setup { policy: Policy::Priority, blocks: 6, ..Setup::default() });
    add_with_priority(&mut rig, 0, 1);
    add_with_priority(&mut rig, 1, 1);
    rig.step();
    let new = rig.sequence(2, 16, 4);
    rig.scheduler.add(NewSequence { priority: 0, ..new });
    assert!(shape(&rig.step()).contains(&(2, 0, 16)));
    assert_eq!([0, 1].map(|id| rig.preemptions(id)), [0, 1], "no more than it needs");
}

#[test]
fn tenants_that_wait_take_turns_by_what_they_were_given() {
    let mut rig = Rig::new(Setup { policy: Policy::Fair, max_num_seqs: 1, ..Setup::default() });
    (0..6).for_each(|id| add_for(&mut rig, id, "flood", 8));
    // Small requests: several of them cost what one of the others does.
    (6..12).for_each(|id| add_for(&mut rig, id, "light", 2));
    rig.run();
    // 8 + 2 for each of the flood's, 2 + 2 for each of the other's.
    assert_eq!(ids(rig.admitted())[..8], [0, 6, 7, 8, 1, 9, 10, 2]);
}

#[test]
fn a_weight_of_three_is_three_times_the_service() {
    let weights = vec![("heavy", 3)];
    let mut rig = Rig::new(Setup { policy: Policy::Fair, max_num_seqs: 1, weights, ..Setup::default() });
    (0..20).for_each(|id| add_for(&mut rig, id, "heavy", 4));
    (20..40).for_each(|id| add_for(&mut rig, id, "light", 4));
    for _ in 0..20 {
        rig.step();
    }
    let heavy = ids(rig.admitted()).into_iter().filter(|&id| id < 20).count();
    assert_eq!(heavy, 15);
}

#[test]
fn idling_saves_no_service_up() {
    let mut rig = Rig::new(Setup { policy: Policy::Fair, max_num_seqs: 1, ..Setup::default() });
    (0..30).for_each(|id| add_for(&mut rig, id, "busy", 4));
    for _ in 0..20 {
        rig.step();
    }
    rig.admitted();
    (30..50).for_each(|id| add_for(&mut rig, id, "late", 4));
    for _ in 0..10 {
        rig.step();
    }
    let late = ids(rig.admitted()).into_iter().filter(|&id| id >= 30).count();
    assert_eq!(late, 5, "half of the service from now on, and not what it left unused");
}

fn caching(blocks: usize, host_blocks: usize) -> Rig {
    Rig::new(Setup { caching: true, blocks, host_blocks, max_num_seqs: 2, ..Setup::default() })
}

fn prompt(len: u32) -> Vec<TokenId> {
    (0..len).map(TokenId).collect()
}

#[test]
fn a_second_prompt_finds_the_full_blocks_of_the_first_and_computes_its_last_token() {
    let mut rig = caching(64, 0);
    rig.add_prompt(0, &prompt(12), 1);
    rig.run();
    rig.add_prompt(1, &prompt(12), 1);
    assert_eq!(shape(&rig.step()), [(1, 8, 4)], "the third block holds the last token");
    rig.add_prompt(2, &prompt(13), 1);
    assert_eq!(shape(&rig.step()), [(2, 12, 1)]);
    rig.add_prompt(3, &prompt(11), 1);
    assert_eq!(shape(&rig.step()), [(3, 8, 3)], "a part of a block is nothing");
    assert_eq!(rig.admitted(), [(0, 0), (1, 8), (2, 12), (3, 8)]);
}

#[test]
fn what_is_in_flight_is_not_found() {
    let mut rig = caching(64, 0);
    rig.add_prompt(0, &prompt(12), 4);
    rig.launch();
    rig.add_prompt(1, &prompt(12), 4);
    assert!(shape(&rig.launch()).contains(&(1, 0, 12)), "if that row fails, nobody has written the blocks");
}

#[test]
fn other_roots_share_nothing() {
    let mut rig = caching(64, 0);
    rig.add_prompt(0, &prompt(12), 1);
    rig.run();
    let new = rig.sequence(1, 1, 1);
    let root = rig.pool.prefix_root(&["model", "salt"], 1);
    rig.scheduler.add(NewSequence { prompt: prompt(12).into(), root, ..new });
    assert_eq!(shape(&rig.step()), [(1, 0, 12)]);
    let parts = [["ab", "c"], ["a", "bc"]].map(|parts| rig.pool.prefix_root(&parts, 0));
    assert_ne!(parts[0], parts[1], "parts never run into each other");
}

#[test]
fn the_next_turn_of_a_chat_finds_what_was_generated_in_the_last() {
    let mut rig = caching(64, 0);
    rig.add_prompt(0, &prompt(7), 10);
    let generated: Vec<TokenId> = rig.run().into_iter().map(|(_, token)| token).collect();
    let next = [prompt(7), generated, vec![TokenId(5); 3]].concat();
    rig.add_prompt(1, &next, 1);
    assert_eq!(shape(&rig.step()), [(1, 16, 4)], "of 17 tokens, the last was never computed");
}

#[test]
fn an_abort_between_chunks_keeps_what_is_finished_and_nothing_else() {
    let setup = Setup { caching: true, max_num_batched_tokens: 10, ..Setup::default() };
    let mut rig = Rig::new(setup);
    rig.add_prompt(0, &prompt(30), 1);
    rig.step();
    rig.launch();
    let removed = rig.scheduler.remove(SeqId(0)).unwrap();
    assert_eq!((removed.blocks_freed, removed.rows_freed), (8, 1), "all blocks of the prompt were its own");
    assert_eq!((rig.pool.counts().cached, rig.pool.counts().owned), (2, 0), "ten tokens fill two blocks");
    rig.add_prompt(1, &prompt(30), 1);
    rig.launch();
    rig.finish();
    assert_eq!(rig.admitted(), [(0, 0), (1, 8)]);
}

#[test]
fn what_was_not_used_for_longest_is_given_up_first_and_a_chain_from_its_end() {
    let mut rig = caching(6, 0);
    rig.add_prompt(0, &prompt(9), 1);
    rig.run();
    let other: Vec<TokenId> = (100..108).map(TokenId).collect();
    rig.add_prompt(1, &other, 1);
    rig.run();
    // Four cached blocks and two free ones; three are taken.
    let third: Vec<TokenId> = (200..211).map(TokenId).collect();
    rig.add_prompt(2, &third, 1);
    rig.run();
    rig.admitted();
    rig.add_prompt(3, &prompt(9), 1);
    rig.step();
    assert_eq!(rig.admitted(), [(3, 4)], "the oldest chain lost its second block");
}

#[test]
fn a_reset_forgets_everything_and_takes_nothing_from_whoever_runs() {
    let mut rig = caching(64, 0);
    rig.add_prompt(0, &prompt(12), 1);
    rig.run();
    rig.add_prompt(1, &prompt(8), 9);
    rig.step();
    assert_eq!(rig.pool.clear_cache(), 2, "the first block is in use");
    let mut events = Vec::new();
    rig.pool.take_events(&mut events);
    assert_eq!(events.last(), Some(&KvEvent::Cleared));
    rig.add_prompt(2, &prompt(12), 1);
    rig.admitted();
    rig.run();
    assert_eq!(rig.admitted(), [(2, 0)]);
}

#[test]
fn positions_whose_logits_are_to_be_reported_are_computed() {
    let mut rig = caching(64, 0);
    rig.add_prompt(0, &prompt(12), 1);
    rig.run();
    let new = rig.sequence(1, 1, 1);
    let sampling = Arc::new(Sampling { prompt_logprobs: Some(0), ..(*new.sampling).clone() });
    rig.scheduler.add(NewSequence { prompt: prompt(12).into(), sampling, ..new });
    let plan = rig.step();
    assert_eq!((shape(&plan), plan.rows[0].targets.len()), (vec![(1, 0, 12)], 11));
}

#[test]
fn what_is_given_up_goes_to_the_host_and_comes_back() {
    let mut rig = caching(4, 4);
    rig.add_prompt(0, &prompt(9), 1);
    rig.run();
    let other: Vec<TokenId> = (100..116).map(TokenId).collect();
    rig.add_prompt(1, &other, 1);
    let plan = rig.step();
    assert_eq!(plan.saves.len(), 2, "two cached blocks are given up");
    rig.add_prompt(2, &prompt(9), 1);
    let plan = rig.step();
    assert_eq!((shape(&plan), plan.loads.len()), (vec![(2, 8, 1)], 2));
    assert_eq!(rig.admitted(), [(0, 0), (1, 0), (2, 8)]);
}

#[test]
fn a_parked_sequence_gives_its_row_and_blocks_up_and_goes_on_from_the_cache() {
    let mut rig = caching(64, 0);
    rig.add_prompt(0, &prompt(9), 20);
    rig.step();
    rig.launch();
    rig.scheduler.park(SeqId(0));
    assert_eq!(rig.scheduler.num_parked(), 0, "a step in flight contains it");
    assert!(rig.launch().rows.is_empty(), "and no other will");
    assert_eq!(rig.finish().len(), 1, "the token in flight still comes");
    assert_eq!((rig.scheduler.num_parked(), rig.scheduler.num_running()), (1, 0));
    assert_eq!((rig.pool.counts().owned, rig.pool.counts().cached), (0, 2));
    assert_eq!(rig.notes.last(), Some(&Note::Parked { seq: SeqId(0) }));
    assert_eq!(rig.waits_for(0), Some(WaitReason::Reader));
    rig.scheduler.park(SeqId(0));
    rig.scheduler.unpark(SeqId(0));
    rig.scheduler.unpark(SeqId(0));
    assert_eq!(shape(&rig.launch()), [(0, 2 * BLOCK, 3)]);
}

#[test]
fn a_sequence_that_is_read_again_before_it_was_parked_just_goes_on() {
    let mut rig = caching(64, 0);
    rig.add_prompt(0, &prompt(9), 20);
    rig.launch();
    rig.scheduler.park(SeqId(0));
    rig.scheduler.unpark(SeqId(0));
    assert_eq!(shape(&rig.launch()), [(0, 9, 1)]);
    rig.finish();
    assert_eq!(rig.scheduler.num_parked(), 0);
}

#[test]
fn a_parked_sequence_in_the_queue_holds_nobody_up() {
    let mut rig = Rig::new(Setup { max_num_seqs: 1, ..Setup::default() });
    (0..3).for_each(|id| rig.add(id, 4, 2));
    rig.step();
    rig.scheduler.park(SeqId(1));
    rig.run();
    assert_eq!(ids(rig.admitted()), [0, 2]);
    rig.scheduler.unpark(SeqId(1));
    rig.run();
    assert_eq!(ids(rig.admitted()), [1]);
}
