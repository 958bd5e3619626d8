//! Single rules of a step, each in the smallest case that shows it.

use std::sync::Arc;

use tidemill_engine::{
    ids::{SeqId, TokenId},
    output::{FinishReason, MatchedStop},
    sampling::Sampling,
    scheduler::{
        Effect, MAX_IN_FLIGHT, NewSequence, RowOutput, RowResult, Stage, StepOutput, TokenInput, WaitReason,
    },
};

use crate::rig::{Rig, Setup, shape};

fn rig(max_num_seqs: usize, max_num_batched_tokens: usize, blocks: usize) -> Rig {
    Rig::new(Setup { max_num_seqs, max_num_batched_tokens, blocks, ..Setup::default() })
}

#[test]
fn a_step_mixes_decode_rows_and_prompt_chunks_and_serves_decode_first() {
    let mut rig = rig(4, 8, 64);
    rig.add(0, 3, 9);
    rig.launch();
    rig.add(1, 20, 9);
    let plan = rig.launch();
    assert_eq!(
        shape(&plan),
        [(0, 3, 1), (1, 0, 7)],
        "a decode row, then as much prompt as the budget leaves"
    );
    assert_eq!(plan.rows[0].input, TokenInput::Sampled(0));
    assert!(plan.rows[0].sample.is_some() && plan.rows[1].sample.is_none());
}

#[test]
fn nobody_is_taken_in_when_no_token_of_the_step_is_left() {
    let mut rig = rig(4, 8, 64);
    rig.add(0, 8, 2);
    rig.add(1, 3, 2);
    assert_eq!(shape(&rig.launch()), [(0, 0, 8)]);
    assert_eq!((rig.scheduler.num_running(), rig.scheduler.num_waiting()), (1, 1));
}

#[test]
fn the_token_of_a_row_is_found_among_all_rows_of_logits() {
    let mut rig = rig(4, 64, 64);
    for id in 0..3 {
        let new = rig.sequence(id, 3, 9);
        let prompt_logprobs = (id != 1).then_some(0);
        let sampling = Arc::new(Sampling { prompt_logprobs, ..(*new.sampling).clone() });
        rig.scheduler.add(NewSequence { sampling, ..new });
    }
    let plan = rig.launch();
    let samples: Vec<_> = plan.samples().collect();
    assert_eq!(samples, [(0, 2), (1, 3), (2, 6)], "two scored positions before a sample");
    let plan = rig.launch();
    let inputs: Vec<_> = plan.rows.iter().map(|row| row.input.clone()).collect();
    assert_eq!(inputs, [2, 3, 6].map(TokenInput::Sampled));
}

#[test]
fn a_prompt_goes_on_behind_its_own_chunk_in_flight() {
    let mut rig = rig(4, 8, 64);
    rig.add(0, 20, 2);
    let mut chunks = vec![rig.launch()];
    while rig.scheduler.num_in_flight() > 0 {
        chunks.push(rig.launch());
        rig.finish();
    }
    let chunks: Vec<_> = chunks.iter().flat_map(shape).collect();
    assert_eq!(chunks, [(0, 0, 8), (0, 8, 8), (0, 16, 4), (0, 20, 1)], "and nothing after the last token");
    assert!(rig.scheduler.get(SeqId(0)).is_none());
}

#[test]
fn prompts_get_no_more_than_their_budget_beside_decode_rows_and_never_stand_still() {
    let mut rig = rig(4, 64, 64);
    rig.add(0, 3, 20);
    rig.step();
    rig.add(1, 30, 1);
    assert_eq!(shape(&rig.launch_with(5)), [(0, 3, 1), (1, 0, 5)]);
    rig.finish();
    assert_eq!(shape(&rig.launch_with(0)), [(0, 4, 1)], "a budget of nothing beside decode rows is kept");
    rig.finish();
    rig.scheduler.remove(SeqId(0));
    assert_eq!(shape(&rig.launch_with(0)), [(1, 5, 1)], "where nothing decodes, a prompt advances");
}

#[test]
fn a_long_prompt_gets_its_part_and_what_short_ones_leave() {
    let setup = Setup { max_num_batched_tokens: 16, long_prefill_token_threshold: 8, ..Setup::default() };
    let mut rig = Rig::new(setup);
    rig.add(0, 40, 1);
    rig.add(1, 40, 1);
    rig.add(2, 5, 1);
    assert_eq!(
        shape(&rig.step()),
        [(0, 0, 11), (2, 0, 5)],
        "one long prompt at a time; it takes what is left"
    );
    rig.add(3, 6, 1);
    rig.add(4, 8, 1);
    assert_eq!(
        shape(&rig.step()),
        [(0, 11, 8), (3, 0, 6), (4, 0, 2)],
        "short ones need not wait for its end"
    );
    assert_eq!(shape(&rig.step()), [(0, 19, 10), (4, 2, 6)]);
}

#[test]
fn when_blocks_run_out_the_youngest_is_preempted_and_comes_back_first() {
    let mut rig = rig(3, 64, 6);
    (0..3).for_each(|id| rig.add(id, 8, 9));
    let mut seen_queued = false;
    for _ in 0..60 {
        while rig.scheduler.num_in_flight() < MAX_IN_FLIGHT && !rig.launch().rows.is_empty() {}
        if rig.scheduler.num_in_flight() > 0 {
            rig.finish();
        }
        assert_eq!(rig.preemptions(0), 0, "the oldest is never preempted");
        seen_queued |= rig.preemptions(2) > 0;
    }
    assert!(seen_queued, "six blocks cannot hold three sequences of five");
    assert_eq!(rig.pool.counts().free, 6);
}

#[test]
fn whoever_was_preempted_goes_before_those_that_never_had_a_row() {
    let mut rig = rig(2, 64, 5);
    rig.add(0, 8, 12);
    rig.add(1, 8, 12);
    rig.add(2, 4, 1);
    while rig.preemptions(1) == 0 {
        rig.step();
    }
    rig.admitted();
    assert_eq!(rig.waits_for(2), Some(WaitReason::Turn { ahead: 1 }));
    rig.run();
    assert_eq!(rig.admitted().iter().map(|&(id, _)| id).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn a_shortage_behind_a_step_in_flight_preempts_nobody_until_nothing_is_in_flight() {
    let mut rig = rig(3, 64, 4);
    // Two blocks each: the third is needed for position 8.
    (0..2).for_each(|id| rig.add(id, 7 - id as usize, 9));
    assert_eq!(shape(&rig.launch()), [(0, 0, 7), (1, 0, 6)]);
    assert_eq!(shape(&rig.launch()), [(0, 7, 1), (1, 6, 1)]);
    rig.finish();
    assert_eq!(shape(&rig.launch()), [(1, 7, 1)], "no block for the older, none needed here");
    rig.finish();
    assert!(rig.launch().rows.is_empty(), "the older is not left out twice");
    assert_eq!(rig.scheduler.num_preemptions(), 0);
    rig.finish();
    assert_eq!(shape(&rig.launch()), [(0, 8, 1)]);
    assert_eq!(rig.scheduler.num_preemptions(), 1);
}

#[test]
fn a_prompt_is_taken_in_when_the_whole_of_it_has_blocks_and_nobody_overtakes_it() {
    let mut rig = rig(3, 8, 4);
    rig.add(0, 5, 9);
    rig.add(1, 11, 2);
    rig.add(2, 3, 2);
    assert_eq!(shape(&rig.launch()), [(0, 0, 5)], "eleven tokens need three blocks of the two that are left");
    assert_eq!(rig.waits_for(1), Some(WaitReason::Blocks { needed: 3, available: 2 }));
    assert_eq!(rig.waits_for(2), Some(WaitReason::Turn { ahead: 1 }));
}

#[test]
fn completions_of_one_prompt_share_its_full_blocks_without_a_prefix_cache() {
    let mut rig = rig(3, 64, 64);
    let first = rig.sequence(0, 13, 9);
    for id in 0..3 {
        let prompt_of = (id > 0).then_some(SeqId(0));
        rig.scheduler.add(NewSequence { id: SeqId(id), prompt_of, ..first.clone() });
    }
    assert_eq!(shape(&rig.launch()), [(0, 0, 13)], "the others wait for the prompt");
    assert_eq!(rig.waits_for(1), Some(WaitReason::Prompt));
    assert_eq!(shape(&rig.launch()), [(0, 13, 1)], "in flight is not enough");
    rig.finish();
    let plan = rig.launch();
    assert_eq!(shape(&plan), [(0, 14, 1), (1, 12, 1), (2, 12, 1)], "three full blocks of four are shared");
    assert_eq!(rig.pool.counts().owned, 3 + 3, "the prompt's full blocks once, and one more for each");
}

#[test]
fn another_completion_reads_the_prompt_when_the_one_that_did_is_gone() {
    let mut rig = rig(3, 8, 64);
    let first = rig.sequence(0, 13, 1);
    for id in 0..3 {
        let prompt_of = (id > 0).then_some(SeqId(0));
        rig.scheduler.add(NewSequence { id: SeqId(id), prompt_of, ..first.clone() });
    }
    rig.step();
    assert_eq!(rig.scheduler.remove(SeqId(0)).map(|removed| removed.blocks_freed), Some(4));
    assert_eq!(shape(&rig.step()), [(1, 0, 8)]);
    assert_eq!(rig.waits_for(2), Some(WaitReason::Prompt));
    rig.step();
    assert_eq!(rig.waits_for(2), None);
}

#[test]
fn what_can_never_fit_is_known_at_admission() {
    let rig = rig(1, 8, 2);
    assert!(rig.scheduler.fits(4, 5), "eight tokens are written: the ninth has no successor");
    assert!(!rig.scheduler.fits(4, 6));
}

/// Plans a step of one row and gives it this token.
fn step_with(rig: &mut Rig, sampled: Option<u32>) -> Effect {
    let plan = rig.scheduler.plan(|_| usize::MAX);
    let sampled = sampled.map(TokenId);
    let rows = vec![RowResult::Done(RowOutput {
        sampled,
        logprobs: None,
        prompt_logprobs: Vec::new(),
        states: Vec::new(),
    })];
    let mut effects = Vec::new();
    rig.scheduler.resolve(plan, StepOutput { rows }, &mut effects);
    assert_eq!(effects.len(), 1, "{effects:?}");
    effects.remove(0)
}

#[test]
fn tokens_that_stop_do_so_once_there_are_enough_and_the_clients_own_is_named() {
    const OWN: u32 = 5;
    const EOS: u32 = 6;
    for (last, stop) in [(OWN, Some(MatchedStop::Token(TokenId(OWN)))), (EOS, None)] {
        let mut rig = rig(4, 64, 64);
        let new = rig.sequence(0, 3, 9);
        let (stop_token_ids, eos_token_ids) = (vec![TokenId(OWN)], vec![TokenId(EOS)]);
        let sampling = Sampling { stop_token_ids, eos_token_ids, min_tokens: 3, ..(*new.sampling).clone() };
        rig.scheduler.add(NewSequence { sampling: Arc::new(sampling), ..new });
        for early in [OWN, EOS] {
            assert!(matches!(step_with(&mut rig, Some(early)), Effect::Token { finish: None, .. }));
        }
        let Effect::Token { finish, .. } = step_with(&mut rig, Some(last)) else { panic!("a token") };
        assert_eq!(finish, Some((FinishReason::Stop, stop)));
        assert_eq!(rig.pool.counts().owned, 0);
    }
}

#[test]
fn a_row_that_wanted_a_token_and_got_none_fails() {
    let mut rig = rig(4, 64, 64);
    rig.add(0, 3, 9);
    let effect = step_with(&mut rig, None);
    assert!(matches!(effect, Effect::Failed { position: 3, error: Some(_), .. }), "{effect:?}");
    assert_eq!((rig.scheduler.num_running(), rig.pool.counts().owned), (0, 0));
}

#[test]
fn a_sequence_reads_its_prompt_until_it_has_a_token() {
    let mut rig = rig(4, 8, 64);
    let stage = |rig: &mut Rig, id| rig.scheduler.remove(SeqId(id)).map(|removed| removed.stage);
    rig.add(0, 12, 9);
    assert_eq!(stage(&mut rig, 0), Some(Stage::Queued));
    rig.add(1, 12, 9);
    assert_eq!(rig.launch().num_tokens(), 8);
    rig.finish();
    assert_eq!(stage(&mut rig, 1), Some(Stage::Prefill), "four tokens are to be read");
    rig.add(2, 1, 9);
    assert_eq!(rig.launch().num_tokens(), 1);
    assert_eq!(stage(&mut rig, 2), Some(Stage::Prefill), "it has no token yet");
    rig.finish();
    rig.add(3, 3, 9);
    rig.launch();
    rig.finish();
    assert_eq!(stage(&mut rig, 3), Some(Stage::Decode));
    assert_eq!(stage(&mut rig, 3), None);
}
