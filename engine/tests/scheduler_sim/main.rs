//! The scheduler in a simulator: no kernels, no threads, no clock.
//!
//! The simulated model computes `next token = H(seed, all previous tokens)` and reads the previous tokens back through the
//! block table from simulated blocks, so keys and values that are lost, stale, duplicated or shared by mistake change the output. The
//! simulated device runs up to two steps behind the host and puts in the tokens that the host did not know. Steps fail, alone and in
//! company, and leave rubbish behind. After every turn everything that must hold is checked. A failing seed is printed and
//! replays.

#![allow(clippy::unwrap_used)]

mod device;
mod sim;

use std::{panic, sync::Arc};

use device::{Device, EOS};
use sim::{Seen, Sim};
use tidemill_engine::{
    ids::{SeqId, TokenId},
    kv::BlockPool,
    runner::StepQueue,
    sampling::Sampling,
    scheduler::{Limits, MAX_IN_FLIGHT, NewSequence, Scheduler, StepPlan, TokenInput},
};

fn sampling(max_tokens: usize, min_tokens: usize) -> Sampling {
    Sampling {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 0,
        max_tokens,
        min_tokens,
        stop_token_ids: Vec::new(),
        eos_token_ids: vec![EOS],
        logprobs: None,
        prompt_logprobs: None,
    }
}

#[test]
fn every_request_gives_what_it_gives_alone_and_no_block_is_lost() {
    let mut all = Seen::default();
    for seed in 0..1000 {
        let result = panic::catch_unwind(|| Sim::new(seed).run(500));
        let seen =
            result.unwrap_or_else(|_| panic!("seed {seed} fails; replay it with Sim::new({seed}).run(500)"));
        all.finished += seen.finished;
        all.broken += seen.broken;
        all.preemptions += seen.preemptions;
        all.fed_back += seen.fed_back;
        all.aborts_over_two_steps += seen.aborts_over_two_steps;
        all.failed_steps += seen.failed_steps;
        all.shortages += seen.shortages;
        all.late_rows += seen.late_rows;
    }
    // The simulation is worth nothing when it does not reach the interesting states.
    let enough = all.finished > 10_000
        && all.broken > 500
        && all.preemptions > 1_000
        && all.fed_back > 50_000
        && all.aborts_over_two_steps > 500
        && all.failed_steps > 1_000
        && all.shortages > 500
        && all.late_rows > 1_000;
    assert!(enough, "{all:?}");
}

fn sequence(id: u64, prompt_len: usize, max_tokens: usize) -> NewSequence {
    NewSequence {
        id: SeqId(id),
        prompt: vec![TokenId(1); prompt_len].into(),
        sampling: Arc::new(Sampling { eos_token_ids: Vec::new(), ..sampling(max_tokens, 0) }),
        seed: id,
        prompt_of: None,
    }
}

/// A scheduler, a device and a pool of blocks of four.
fn scheduler(
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    blocks: usize,
) -> (Scheduler, StepQueue<Device>, BlockPool) {
    let pool = BlockPool::new(blocks, 4);
    let steps = StepQueue::new(Device::new(0, blocks, 4, 0.0));
    (Scheduler::new(Limits { max_num_seqs, max_num_batched_tokens }, pool.clone()), steps, pool)
}

/// Plans a step and launches it.
fn launch(scheduler: &mut Scheduler, steps: &mut StepQueue<Device>) -> StepPlan {
    let plan = scheduler.plan();
    if !plan.rows.is_empty() {
        steps.launch(plan.clone()).unwrap();
    }
    scheduler.check();
    plan
}

fn finish(scheduler: &mut Scheduler, steps: &mut StepQueue<Device>) {
    let (plan, output) = steps.finish().unwrap();
    scheduler.resolve(&plan, output);
    scheduler.check();
}

/// Sequence, first position and number of tokens of each row.
fn shape(plan: &StepPlan) -> Vec<(u64, usize, usize)> {
    plan.rows.iter().map(|row| (row.seq.0, row.start, row.input.num_tokens())).collect()
}

#[test]
fn a_step_mixes_decode_rows_and_prompt_chunks_and_serves_decode_first() {
    let (mut scheduler, mut steps, _) = scheduler(4, 8, 64);
    scheduler.add(sequence(0, 3, 9));
    launch(&mut scheduler, &mut steps);
    scheduler.add(sequence(1, 20, 9));
    let plan = launch(&mut scheduler, &mut steps);
    assert_eq!(
        shape(&plan),
        [(0, 3, 1), (1, 0, 7)],
        "a decode row, then as much prompt as the budget leaves"
    );
    assert_eq!(plan.rows[0].input, TokenInput::Sampled(0));
    assert!(plan.rows[0].sample.is_some() && plan.rows[1].sample.is_none());
}

#[test]
fn the_token_of_a_row_is_found_among_all_rows_of_logits() {
    let (mut scheduler, mut steps, _) = scheduler(4, 64, 64);
    let scoring = |id| {
        let new = sequence(id, 3, 9);
        NewSequence {
            sampling: Arc::new(Sampling { prompt_logprobs: Some(0), ..(*new.sampling).clone() }),
            ..new
        }
    };
    scheduler.add(scoring(0));
    scheduler.add(sequence(1, 3, 9));
    scheduler.add(scoring(2));
    let plan = launch(&mut scheduler, &mut steps);
    assert_eq!(
        plan.samples().collect::<Vec<_>>(),
        [(0, 2), (1, 3), (2, 6)],
        "two scored positions before a sample"
    );
    let plan = launch(&mut scheduler, &mut steps);
    let inputs: Vec<_> = plan.rows.iter().map(|row| row.input.clone()).collect();
    assert_eq!(inputs, [2, 3, 6].map(TokenInput::Sampled));
}

#[test]
fn a_prompt_goes_on_behind_its_own_chunk_in_flight() {
    let (mut scheduler, mut steps, _) = scheduler(4, 8, 64);
    scheduler.add(sequence(0, 20, 2));
    let mut chunks = vec![launch(&mut scheduler, &mut steps)];
    while scheduler.num_in_flight() > 0 {
        chunks.push(launch(&mut scheduler, &mut steps));
        finish(&mut scheduler, &mut steps);
    }
    let chunks: Vec<_> = chunks.iter().flat_map(shape).collect();
    assert_eq!(chunks, [(0, 0, 8), (0, 8, 8), (0, 16, 4), (0, 20, 1)], "and nothing after the last token");
    assert!(scheduler.get(SeqId(0)).is_none());
}

#[test]
fn when_blocks_run_out_the_youngest_is_preempted_and_comes_back_first() {
    let (mut scheduler, mut steps, pool) = scheduler(3, 64, 6);
    (0..3).for_each(|id| scheduler.add(sequence(id, 8, 9)));
    let mut seen_queued = false;
    for _ in 0..60 {
        while scheduler.num_in_flight() < MAX_IN_FLIGHT && !launch(&mut scheduler, &mut steps).rows.is_empty()
        {
        }
        if scheduler.num_in_flight() > 0 {
            finish(&mut scheduler, &mut steps);
        }
        let preempted = |id| scheduler.get(SeqId(id)).map_or(0, |seq| seq.num_preemptions());
        assert_eq!(preempted(0), 0, "the oldest is never preempted");
        seen_queued |= preempted(2) > 0;
    }
    assert!(seen_queued, "six blocks cannot hold three sequences of five");
    assert_eq!(pool.counts().free, 6);
}

#[test]
fn a_shortage_behind_a_step_in_flight_preempts_nobody_until_nothing_is_in_flight() {
    let (mut scheduler, mut steps, _) = scheduler(3, 64, 4);
    // Two blocks each: the third is needed for position 8.
    (0..2).for_each(|id| scheduler.add(sequence(id, 7 - id as usize, 9)));
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 0, 7), (1, 0, 6)]);
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 7, 1), (1, 6, 1)]);
    finish(&mut scheduler, &mut steps);
    assert_eq!(
        shape(&launch(&mut scheduler, &mut steps)),
        [(1, 7, 1)],
        "no block for the older, none needed here"
    );
    finish(&mut scheduler, &mut steps);
    assert!(launch(&mut scheduler, &mut steps).rows.is_empty(), "the older is not left out twice");
    assert_eq!(scheduler.num_preemptions(), 0);
    finish(&mut scheduler, &mut steps);
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 8, 1)]);
    assert_eq!(scheduler.num_preemptions(), 1);
}

#[test]
fn in_a_shortage_behind_a_step_in_flight_nobody_is_admitted() {
    let (mut scheduler, mut steps, pool) = scheduler(3, 8, 4);
    scheduler.add(sequence(0, 5, 9));
    scheduler.add(sequence(1, 11, 2));
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 0, 5), (1, 0, 3)]);
    scheduler.add(sequence(2, 3, 2));
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 5, 1)], "seven tokens need two more blocks");
    assert_eq!(pool.counts().free, 1, "the newcomer would take what the prompt needs");
}

#[test]
fn completions_of_one_prompt_share_its_full_blocks() {
    let (mut scheduler, mut steps, pool) = scheduler(3, 64, 64);
    scheduler.add(sequence(0, 13, 9));
    (1..3).for_each(|id| scheduler.add(NewSequence { prompt_of: Some(SeqId(0)), ..sequence(id, 13, 9) }));
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 0, 13)], "the others wait for the prompt");
    assert_eq!(shape(&launch(&mut scheduler, &mut steps)), [(0, 13, 1)], "in flight is not enough");
    finish(&mut scheduler, &mut steps);
    let plan = launch(&mut scheduler, &mut steps);
    assert_eq!(shape(&plan), [(0, 14, 1), (1, 12, 1), (2, 12, 1)], "three full blocks of four are shared");
    assert_eq!(pool.counts().owned, 3 + 3, "the prompt's full blocks once, and one more for each");
}

#[test]
fn what_can_never_fit_is_known_at_admission() {
    let (scheduler, _, _) = scheduler(1, 8, 2);
    assert!(scheduler.fits(4, 5), "eight tokens are written: the ninth has no successor");
    assert!(!scheduler.fits(4, 6));
}
