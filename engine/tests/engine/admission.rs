//! Who is let into the queue, and what those hear who are not.

use std::{
    thread,
    time::{Duration, Instant},
};

use tidemill_engine::{
    Engine, EngineConfig, ErrorCode, Generation, LoadError, RequestError, ids::TenantId,
    model::files::ModelSource, request::GenerateRequest, scheduler::Policy,
};

use crate::rig::{Bench, collect, eventually, request, submit};

/// One row; a step ends when the test says so, and only then is the next one planned.
fn one_row(max_queue_time: Option<Duration>) -> Bench {
    Bench::with(|options| {
        options.max_num_seqs = 1;
        options.engine.look_ahead = false;
        options.engine.scheduling.max_num_queued_reqs = 100;
        options.engine.scheduling.max_queue_time = max_queue_time;
    })
}

/// Lets requests leave the queue, each after `pace`.
fn let_leave(bench: &Bench, count: usize, pace: Duration) {
    for _ in 0..count {
        bench.step_started();
        thread::sleep(pace);
        bench.finish_step();
    }
    bench.step_started();
}

fn many(bench: &Bench, ids: std::ops::Range<usize>) -> Vec<Generation> {
    ids.map(|id| submit(&bench.handle(), request(&id.to_string(), &[1, 2], 1))).collect()
}

#[test]
fn the_queue_is_bounded_by_prompt_tokens_and_an_empty_one_takes_any() {
    let bench = Bench::with(|options| {
        options.engine.look_ahead = false;
        options.engine.scheduling.max_num_queued_tokens = Some(10);
    });
    let handle = bench.handle();
    let running = submit(&handle, request("running", &[1], 1));
    bench.step_started();
    let long = submit(&handle, request("long", &[1; 30], 1));
    let refused = handle.submit(handle.validate(request("no room", &[1], 1)).unwrap()).map(drop);
    let Err(RequestError::QueueFull { waiting: 1, retry_after }) = refused else { panic!("{refused:?}") };
    assert_eq!(retry_after, Duration::from_secs(1), "no rate is known yet");
    assert_eq!(handle.stats().counters.refused, 1);
    bench.finish_steps(20);
    collect(running).unwrap();
    collect(long).unwrap();
    collect(submit(&handle, request("later", &[1], 1))).unwrap();
}

#[test]
fn a_wait_that_would_be_too_long_is_refused_at_once_with_a_hint() {
    let limit = Duration::from_secs(2);
    let bench = one_row(Some(limit));
    let handle = bench.handle();
    let mut taken = many(&bench, 0..20);
    // 80 ms for each: 15 that wait are well within the limit, 40 are not.
    let_leave(&bench, 5, Duration::from_millis(80));
    let mut refused = None;
    for id in 20..60 {
        let start = Instant::now();
        let mut generation = submit(&handle, request(&id.to_string(), &[1, 2], 1));
        let explained = crate::rig::block_on(handle.explain(generation.id().clone())).unwrap();
        if explained.is_none() {
            refused = Some((generation.next_blocking().unwrap().unwrap_err(), start.elapsed()));
            break;
        }
        taken.push(generation);
    }
    let Some((error, after)) = refused else {
        panic!("40 requests that would wait for more than 3 s are in")
    };
    let RequestError::Overloaded { wait, limit: said, retry_after } = error else { panic!("{error:?}") };
    assert!(wait > limit && said == limit && retry_after == (wait - limit).max(Duration::from_millis(50)));
    assert_eq!(error.code(), ErrorCode::ResourceExhausted);
    assert!(after < Duration::from_millis(200), "{after:?}");
    assert_eq!(handle.stats().counters.refused, 1);
    assert!(taken.len() >= 20, "those within the limit are in");
    bench.finish_steps(100);
    taken.into_iter().for_each(|generation| drop(collect(generation).unwrap()));
    collect(submit(&handle, request("after", &[1], 1))).unwrap();
}

#[test]
fn whoever_waits_longer_than_the_limit_is_told_so() {
    let bench = one_row(Some(Duration::from_millis(60)));
    let handle = bench.handle();
    let running = submit(&handle, request("running", &[1], 1));
    bench.step_started();
    let error = collect(submit(&handle, request("queued", &[1], 1))).unwrap_err();
    let RequestError::Overloaded { wait, limit, .. } = error else { panic!("{error:?}") };
    assert!(wait >= limit && limit == Duration::from_millis(60), "{wait:?}");
    eventually("its place is given back", || handle.stats().num_requests_waiting == 0);
    let counters = handle.stats().counters;
    assert_eq!((counters.refused, counters.failed), (1, 0));
    // The limit is for the queue: the running one stays.
    bench.finish_step();
    assert_eq!(collect(running).unwrap().0, [301]);
}

#[test]
fn a_deadline_that_the_queue_does_not_leave_is_refused_at_once() {
    let bench = one_row(None);
    let handle = bench.handle();
    let taken = many(&bench, 0..20);
    let_leave(&bench, 5, Duration::from_millis(50));
    // 14 are ahead: 700 ms and more.
    let start = Instant::now();
    let with_deadline = |id, ms| GenerateRequest {
        deadline: Some(Instant::now() + Duration::from_millis(ms)),
        ..request(id, &[1, 2], 1)
    };
    let error = collect(submit(&handle, with_deadline("soon", 300))).unwrap_err();
    assert!(start.elapsed() < Duration::from_millis(200), "it was not the deadline that ended it");
    assert!(
        matches!(error, RequestError::Overloaded { wait, limit, .. } if wait > limit && limit <= Duration::from_millis(300)),
        "{error:?}"
    );
    let late = submit(&handle, with_deadline("late", 600_000));
    bench.finish_steps(100);
    assert_eq!(collect(late).unwrap().0, [302]);
    taken.into_iter().for_each(|generation| drop(collect(generation).unwrap()));
}

#[test]
fn an_idle_engine_refuses_nothing_by_estimate() {
    let bench = one_row(Some(Duration::from_secs(60)));
    let handle = bench.handle();
    // It learns that a step takes 40 ms and that requests leave the queue slowly.
    let first: Vec<_> = (0..3).map(|id| submit(&handle, request(&id.to_string(), &[1, 2], 3))).collect();
    for _ in 0..9 {
        bench.step_started();
        thread::sleep(Duration::from_millis(40));
        bench.finish_step();
    }
    first.into_iter().for_each(|generation| drop(collect(generation).unwrap()));
    let deadline = Some(Instant::now() + Duration::from_millis(100));
    let hopeless = submit(&handle, GenerateRequest { deadline, ..request("hopeless", &[1; 20], 30) });
    let error = collect(hopeless).unwrap_err();
    assert_eq!(error, RequestError::DeadlineExceeded { completion_tokens: 0 });
    assert_eq!(handle.stats().counters.refused, 0);
}

#[test]
fn options_that_contradict_each_other_are_named_at_the_start() {
    let named = |change: &dyn Fn(&mut crate::rig::Options)| match Bench::try_with(change).map(drop) {
        Err(LoadError::Option { option, detail }) => (option, detail),
        other => panic!("{other:?}"),
    };
    let (option, detail) = named(&|options| options.max_num_seqs = 9);
    assert!(option == "--max-num-batched-tokens" && detail.contains("--max-num-seqs"), "{option}: {detail}");
    let zero = Duration::ZERO;
    assert_eq!(named(&|o| o.engine.scheduling.target_itl = Some(zero)).0, "--target-itl-ms");
    assert_eq!(named(&|o| o.engine.scheduling.max_stream_buffer = 0).0, "--max-stream-buffer");
    assert_eq!(named(&|o| o.engine.scheduling.max_num_queued_tokens = Some(0)).0, "--max-num-queued-tokens");
    let weights = |o: &mut crate::rig::Options| {
        o.engine.scheduling.tenant_weights.insert(TenantId::new("a"), 2);
    };
    assert_eq!(named(&weights).0, "--tenant-weight");
    let both = |o: &mut crate::rig::Options| {
        weights(o);
        o.engine.scheduling.policy = Policy::Fair;
    };
    assert!(Bench::try_with(both).is_ok());
}

#[test]
fn rows_are_lowered_to_the_tokens_of_a_step_unless_both_are_given() {
    let config = EngineConfig { max_num_batched_tokens: Some(8), ..EngineConfig::new(ModelSource::Builtin) };
    let both = EngineConfig { max_num_seqs: Some(9), ..config.clone() };
    let Err(LoadError::Option { option, detail }) = Engine::start(both, |_| ()).map(drop) else {
        panic!("9 rows do not fit 8 tokens")
    };
    assert!(option == "--max-num-batched-tokens" && detail.contains("--max-num-seqs"), "{detail}");
    let engine = Engine::start(config, |_| ()).unwrap();
    let info = engine.handle().info().clone();
    assert_eq!((info.max_num_seqs, info.max_num_batched_tokens), (8, 8));
}
