//! A request's way through the engine, and every way out of it.

use std::{
    thread,
    time::{Duration, Instant},
};

use tidemill_engine::{
    ErrorCode, RequestError, StopReason,
    ids::{RequestId, TokenId},
    output::{AbortStage, FinishReason, MatchedStop},
    request::GenerateRequest,
    scheduler::{StepPlan, TokenInput},
};

use crate::rig::{Bench, LOSS, NAN, POISON, block_on, collect, eventually, request, submit};

#[test]
fn a_step_that_hangs_shows_in_the_heartbeat_however_many_commands_come() {
    let bench = Bench::new();
    let handle = bench.handle();
    let running = submit(&handle, request("running", &[1, 2], 1));
    bench.step_started();
    let hangs_since = Instant::now();
    while hangs_since.elapsed() < Duration::from_millis(100) {
        handle.abort_blocking(RequestId::new("nobody")).unwrap();
    }
    assert!(handle.stats().heartbeat_age >= Duration::from_millis(90), "{:?}", handle.stats());
    bench.finish_step();
    collect(running).unwrap();
    eventually("idle", || handle.stats().heartbeat_age == Duration::ZERO);
}

#[test]
fn the_next_step_is_launched_before_the_results_of_the_one_in_flight() {
    let bench = Bench::new();
    let handle = bench.handle();
    let generation = submit(&handle, request("a", &[1, 2, 3], 4));
    let first = bench.step_started();
    assert_eq!(first.rows[0].input, TokenInput::Known([1, 2, 3].map(TokenId).into()));
    for position in 3..6 {
        let next = bench.step_started();
        assert_eq!((next.rows[0].start, &next.rows[0].input), (position, &TokenInput::Sampled(0)));
        assert!(bench.started.is_empty(), "two steps are in flight, not three");
        // Only now the step before it may end.
        bench.finish_step();
    }
    bench.finish_step();
    assert_eq!(collect(generation).unwrap().0, [303, 304, 305, 306]);
    assert!(bench.started.is_empty(), "nothing is computed after the last token");
}

#[test]
fn without_look_ahead_a_step_is_launched_after_the_results_of_the_one_before() {
    let bench = Bench::looking_ahead(false);
    let handle = bench.handle();
    let generation = submit(&handle, request("a", &[1, 2, 3], 2));
    bench.step_started();
    thread::sleep(Duration::from_millis(50));
    assert!(bench.started.is_empty());
    bench.finish_step();
    let next = bench.step_started();
    assert_eq!(next.rows[0].input, TokenInput::Known(vec![TokenId(303)]));
    bench.finish_step();
    assert_eq!(collect(generation).unwrap().0, [303, 304]);
}

#[test]
fn a_row_that_needs_the_host_waits_for_its_token_and_holds_nobody_up() {
    let bench = Bench::new();
    let handle = bench.handle();
    let mut penalised = request("penalised", &[1, 2, 3], 3);
    penalised.sampling.frequency_penalty = Some(0.5);
    let penalised = submit(&handle, penalised);
    bench.step_started();
    let free = submit(&handle, request("free", &[1, 2], 4));
    bench.finish_step();
    let rows = |plan: StepPlan| plan.rows.iter().map(|row| (row.seq.0, row.start)).collect::<Vec<_>>();
    assert_eq!(rows(bench.step_started()), [(1, 0)], "its token was not known when this was planned");
    assert_eq!(rows(bench.step_started()), [(0, 3), (1, 2)]);
    bench.finish_step();
    assert_eq!(rows(bench.step_started()), [(1, 3)]);
    bench.finish_step();
    assert_eq!(rows(bench.step_started()), [(0, 4), (1, 4)]);
    bench.finish_steps(2);
    assert_eq!(collect(penalised).unwrap().0, [303, 304, 305]);
    assert_eq!(collect(free).unwrap().0, [302, 303, 304, 305]);
}

#[test]
fn abort_frees_at_once_at_every_stage_while_steps_run() {
    let bench = Bench::new();
    let handle = bench.handle();
    let long: Vec<u32> = (1..=30).collect();
    let prefill = submit(&handle, request("prefill", &long, 9));
    bench.step_started();
    bench.step_started();
    let queued = [submit(&handle, request("q1", &[1, 2], 9)), submit(&handle, request("q2", &[1, 2], 9))];
    // The steps with the first two chunks of eight tokens are still in flight.
    let receipt = handle.abort_blocking(RequestId::new("prefill")).unwrap();
    assert_eq!((receipt.stage, receipt.blocks_freed, receipt.rows_freed), (AbortStage::Prefill, 8, 1));
    assert!(bench.all_free(), "blocks are free before a step ends");
    let receipt = handle.abort_blocking(RequestId::new("q2")).unwrap();
    assert_eq!((receipt.stage, receipt.blocks_freed, receipt.rows_freed), (AbortStage::Queued, 0, 0));
    bench.finish_step();
    // q1's prompt, and behind it its second token, from its first.
    bench.step_started();
    bench.finish_step();
    bench.step_started();
    bench.finish_step();
    bench.step_started();
    let receipt = handle.abort_blocking(RequestId::new("q1")).unwrap();
    assert_eq!((receipt.stage, receipt.completion_tokens, receipt.blocks_freed), (AbortStage::Decode, 1, 1));
    assert!(bench.all_free() && receipt.time_to_free < Duration::from_secs(1), "two steps are in flight");
    bench.finish_steps(2);
    for generation in [prefill].into_iter().chain(queued) {
        let (_, last) = collect(generation).unwrap();
        assert_eq!(last.finish.unwrap().reason, FinishReason::Abort);
    }
}

#[test]
fn abort_is_idempotent_and_unknown_ids_are_answered() {
    let bench = Bench::new();
    let handle = bench.handle();
    let stage = |id: &str| handle.abort_blocking(RequestId::new(id)).unwrap().stage;
    assert_eq!(stage("nobody"), AbortStage::Unknown);
    let generation = submit(&handle, request("a", &[1, 2, 3], 2));
    bench.finish_step();
    bench.finish_step();
    let (tokens, _) = collect(generation).unwrap();
    assert_eq!(tokens, [303, 304]);
    let receipt = handle.abort_blocking(RequestId::new("a")).unwrap();
    assert_eq!(
        (receipt.stage, receipt.completion_tokens, receipt.blocks_freed),
        (AbortStage::Finished, 2, 0)
    );
    assert_eq!(stage("a"), AbortStage::Finished);
}

#[test]
fn a_dropped_stream_is_an_abort_that_waits_for_no_token() {
    let bench = Bench::new();
    let handle = bench.handle();
    let generation = submit(&handle, request("a", &[1, 2, 3], 9));
    bench.step_started();
    assert!(!bench.all_free());
    drop(generation);
    eventually("the blocks come back while the step still runs", || bench.all_free());
    bench.finish_step();
    assert_eq!(handle.stats().counters.aborted, 1);
}

#[test]
fn a_duplicate_id_is_refused_and_its_stream_cannot_abort_the_first() {
    let bench = Bench::new();
    let handle = bench.handle();
    let first = submit(&handle, request("a", &[1, 2, 3], 1));
    bench.step_started();
    drop(submit(&handle, request("a", &[4], 1)));
    let second = submit(&handle, request("a", &[4], 1));
    assert!(matches!(collect(second), Err(RequestError::DuplicateId(id)) if id == "a"));
    bench.finish_step();
    assert_eq!(collect(first).unwrap().0, [303]);
}

#[test]
fn a_row_that_panics_or_has_no_finite_logits_takes_nobody_along() {
    let bench = Bench::new();
    let handle = bench.handle();
    let good = submit(&handle, request("good", &[1, 2, 3], 3));
    bench.step_started();
    let bad = submit(&handle, request("bad", &[POISON.0], 3));
    let nan = submit(&handle, request("nan", &[NAN.0], 3));
    bench.finish_steps(20);
    assert_eq!(collect(good).unwrap().0, [303, 304, 305]);
    assert!(matches!(collect(bad), Err(RequestError::Internal(_))));
    assert_eq!(collect(nan).unwrap_err(), RequestError::NotFinite { position: 1 });
    eventually("all blocks are free", || bench.all_free());
}

#[test]
fn deadlines_end_queued_and_running_requests() {
    let bench = Bench::new();
    let handle = bench.handle();
    let soon = |id| {
        let deadline = Some(Instant::now() + Duration::from_millis(50));
        submit(&handle, GenerateRequest { deadline, ..request(id, &[1, 2, 3], 5) })
    };
    let running = soon("running");
    bench.step_started();
    let queued = soon("queued");
    for generation in [running, queued] {
        assert_eq!(collect(generation).unwrap_err(), RequestError::DeadlineExceeded { completion_tokens: 0 });
    }
    assert!(bench.all_free(), "freed although the step has not ended");
    bench.finish_step();
}

#[test]
fn a_full_queue_refuses_at_once_and_takes_work_again_later() {
    let bench = Bench::looking_ahead(false);
    let handle = bench.handle();
    let mut live = vec![submit(&handle, request("0", &[1], 1))];
    bench.step_started();
    live.extend((1..=3).map(|i| submit(&handle, request(&i.to_string(), &[1], 1))));
    let refused = handle.submit(handle.validate(request("4", &[1], 1)).unwrap());
    assert!(matches!(refused, Err(RequestError::QueueFull { waiting: 3, .. })));
    bench.finish_steps(20);
    live.into_iter().for_each(|generation| drop(collect(generation).unwrap()));
    collect(submit(&handle, request("5", &[1], 1))).unwrap();
}

#[test]
fn a_drain_lets_the_running_finish_and_cuts_off_after_the_grace() {
    let bench = Bench::new();
    let handle = bench.handle();
    let quick = submit(&handle, request("quick", &[1], 1));
    let slow = submit(&handle, request("slow", &[1], 50));
    bench.step_started();
    let drain = {
        let handle = handle.clone();
        thread::spawn(move || block_on(handle.drain(Duration::from_millis(200))).unwrap())
    };
    eventually("draining", || handle.stats().draining);
    let refused = handle.submit(handle.validate(request("late", &[1], 1)).unwrap());
    assert_eq!(refused.map(drop).unwrap_err(), RequestError::Draining);
    bench.finish_step();
    assert_eq!(collect(quick).unwrap().0, [301]);
    assert_eq!(collect(slow).map(drop).unwrap_err(), RequestError::Draining);
    let drained = drain.join().unwrap();
    assert_eq!((drained.finished, drained.cut_off), (1, 1));
    assert!(bench.all_free());
}

#[test]
fn when_the_engine_goes_every_request_is_told_at_once() {
    let mut bench = Bench::new();
    let handle = bench.handle();
    let generation = submit(&handle, request("a", &[1], 40));
    bench.step_started();
    let engine = bench.engine.take();
    let stop = thread::spawn(move || drop(engine));
    // The step has not ended yet.
    assert_eq!(collect(generation), Err(RequestError::EngineStopped("it was shut down".into())));
    bench.finish_step();
    stop.join().unwrap();
    assert!(handle.is_stopped());
    let late = handle.validate(request("late", &[1], 1)).and_then(|request| handle.submit(request)).map(drop);
    assert!(matches!(late, Err(RequestError::EngineStopped(_))));
    assert!(matches!(handle.abort_blocking(RequestId::new("a")), Err(RequestError::EngineStopped(_))));
}

#[test]
fn a_lost_device_ends_everything_at_once_as_unavailable() {
    let bench = Bench::new();
    let handle = bench.handle();
    let running = submit(&handle, request("running", &[1, 2], 40));
    bench.step_started();
    bench.step_started();
    let fatal = submit(&handle, request("fatal", &[LOSS.0], 40));
    bench.finish_step();
    bench.step_started();
    let queued = submit(&handle, request("queued", &[1, 2], 40));
    bench.finish_step();
    bench.finish_step();
    let lost = RequestError::DeviceLost("fell off the bus".into());
    for generation in [running, fatal, queued] {
        let error = collect(generation).unwrap_err();
        assert_eq!((error.code(), &error), (ErrorCode::DeviceLost, &lost));
    }
    assert_eq!(block_on(handle.stopped()), StopReason::DeviceLost("fell off the bus".into()));
    assert!(handle.is_stopped() && bench.all_free());
    let late = handle.validate(request("late", &[1], 1)).and_then(|request| handle.submit(request)).map(drop);
    assert_eq!(late.unwrap_err(), lost);
    assert_eq!(handle.abort_blocking(RequestId::new("running")).unwrap_err(), lost);
    assert_eq!(block_on(handle.drain(Duration::ZERO)).unwrap_err(), lost);
}

#[test]
fn n_completions_share_a_request_and_end_with_it() {
    let bench = Bench::new();
    let handle = bench.handle();
    let mut asked = request("a", &[1, 2, 3, 4, 5], 3);
    asked.sampling.n = Some(2);
    let mut generation = submit(&handle, asked);
    bench.finish_steps(20);
    let mut tokens = [Vec::new(), Vec::new()];
    while let Some(output) = generation.next_blocking() {
        let output = output.unwrap();
        tokens[output.index as usize].extend(output.token_ids.iter().map(|token| token.0));
    }
    assert_eq!(tokens, [[305, 306, 307], [305, 306, 307]]);
    eventually("all blocks are free", || bench.all_free());
}

#[test]
fn a_stop_string_ends_the_completion_before_its_tokens_run_out() {
    let bench = Bench::new();
    let handle = bench.handle();
    let text = handle.text().clone();
    let all: Vec<TokenId> = (303..310).map(TokenId).collect();
    let whole = text.decode(&all, false).unwrap();
    let first_two = text.decode(&all[..2], false).unwrap();
    // The stop string straddles the edge between the second and the third token.
    let cut = first_two.char_indices().last().unwrap().0;
    let stop: String = whole[cut..].chars().take(2).collect();
    let mut asked = request("a", &[1, 2, 3], 40);
    asked.sampling.stop = vec![stop.clone()];
    let mut generation = submit(&handle, asked);
    bench.finish_steps(60);
    let mut said = String::new();
    let finish = loop {
        let output = generation.next_blocking().unwrap().unwrap();
        said += &output.text;
        if let Some(finish) = output.finish {
            break finish;
        }
    };
    assert_eq!(said, whole[..whole.find(&stop).unwrap()]);
    assert_eq!((finish.reason, finish.matched_stop), (FinishReason::Stop, Some(MatchedStop::Text(stop))));
    assert!(finish.usage.completion_tokens <= 3, "tokens after the stop string are not part of it");
    eventually("all blocks are free", || bench.all_free());
}
