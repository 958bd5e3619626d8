//! Readers that do not keep up.

use std::{thread, time::Duration};

use tidemill_engine::{
    ErrorCode, Generation, RequestError,
    explain::{Life, RequestState},
    ids::RequestId,
    output::FinishReason,
    scheduler::WaitReason,
};

use crate::rig::{Bench, block_on, collect, eventually, request, submit};

const BUFFER: usize = 4;

/// A device that runs freely, and streams that hold four tokens.
fn bench(timeout: Duration, look_ahead: bool) -> Bench {
    let bench = Bench::with(|options| {
        options.engine.look_ahead = look_ahead;
        options.engine.scheduling.max_stream_buffer = BUFFER;
        options.engine.scheduling.slow_reader_timeout = timeout;
    });
    bench.finish_steps(2000);
    bench
}

const LONG: Duration = Duration::from_secs(600);

fn parked(bench: &Bench) -> usize {
    bench.handle().stats().num_requests_parked
}

/// Tokens that can be had without another step.
fn take(generation: &mut Generation, count: usize) -> Vec<u32> {
    let mut next = || generation.next_blocking().unwrap().unwrap().token_ids[0].0;
    (0..count).map(|_| next()).collect()
}

#[test]
fn a_stream_that_nobody_reads_is_parked_and_nobody_else_notices() {
    for look_ahead in [true, false] {
        let bench = bench(LONG, look_ahead);
        let handle = bench.handle();
        let slow = submit(&handle, request("slow", &[1, 2, 3], 40));
        eventually("parked", || parked(&bench) == 1);
        assert!(bench.all_free(), "it gives its blocks up");
        // Others go on as if it were not there.
        for id in ["a", "b", "c"] {
            assert_eq!(collect(submit(&handle, request(id, &[1], 9))).unwrap().0.len(), 9);
        }
        let explained = block_on(handle.explain(RequestId::new("slow"))).unwrap().unwrap();
        assert_eq!((explained.state, explained.waits_for), (RequestState::Parked, Some(WaitReason::Reader)));
        let in_flight = if look_ahead { 2 } else { 1 };
        assert!((BUFFER..=BUFFER + in_flight).contains(&explained.completion_tokens), "{explained:?}");
        // Its client reads again, and sees nothing of all this.
        assert_eq!(collect(slow).unwrap().0, (303..343).collect::<Vec<_>>());
        let ended = block_on(handle.explain(RequestId::new("slow"))).unwrap().unwrap();
        let count = |what: fn(&Life) -> bool| ended.life.iter().filter(|event| what(&event.what)).count();
        let parked = count(|what| matches!(what, Life::Parked));
        assert!(parked >= 1 && parked as u64 <= handle.stats().counters.parked, "{ended:?}");
        assert_eq!(count(|what| matches!(what, Life::Unparked)), parked);
        assert!(count(|what| matches!(what, Life::Resumed { .. })) >= 1);
    }
}

#[test]
fn it_goes_on_when_half_is_read_and_is_parked_again_when_the_reader_stops_again() {
    let bench = bench(LONG, false);
    let handle = bench.handle();
    let mut slow = submit(&handle, request("slow", &[1, 2, 3], 40));
    for round in 0..5 {
        eventually("parked", || handle.stats().counters.parked == round + 1 && parked(&bench) == 1);
        let tokens = take(&mut slow, BUFFER / 2);
        assert_eq!(tokens[0], 303 + (round as u32) * BUFFER as u32 / 2);
    }
    assert_eq!(collect(slow).unwrap().0.len(), 40 - 5 * BUFFER / 2);
}

#[test]
fn a_reader_that_does_not_come_back_is_given_up() {
    let bench = bench(Duration::from_millis(80), true);
    let handle = bench.handle();
    let mut slow = submit(&handle, request("slow", &[1, 2, 3], 40));
    let other = submit(&handle, request("other", &[1, 2, 3], 3));
    eventually("given up", || handle.stats().counters.failed == 1);
    assert!(bench.all_free() && parked(&bench) == 0);
    // What it had is still there to be read, and then the reason.
    take(&mut slow, BUFFER);
    let error = collect(slow).unwrap_err();
    assert!(matches!(error, RequestError::SlowReader { unread } if unread >= Duration::from_millis(80)));
    assert_eq!(error.code(), ErrorCode::ResourceExhausted);
    assert_eq!(collect(other).unwrap().0.len(), 3);
}

#[test]
fn a_parked_request_can_be_aborted_and_dropped() {
    let bench = bench(LONG, true);
    let handle = bench.handle();
    let aborted = submit(&handle, request("aborted", &[1, 2, 3], 40));
    let dropped = submit(&handle, request("dropped", &[1, 2, 3], 40));
    eventually("both are parked", || parked(&bench) == 2);
    let receipt = handle.abort_blocking(RequestId::new("aborted")).unwrap();
    assert!(receipt.completion_tokens >= BUFFER && receipt.blocks_freed == 0, "{receipt:?}");
    drop(dropped);
    eventually("gone", || parked(&bench) == 0);
    let (tokens, last) = collect(aborted).unwrap();
    assert_eq!((tokens.len(), last.finish.unwrap().reason), (receipt.completion_tokens, FinishReason::Abort));
    assert_eq!(handle.stats().counters.aborted, 2);
}

#[test]
fn all_completions_of_a_request_are_parked_together() {
    let bench = bench(LONG, true);
    let handle = bench.handle();
    let mut asked = request("two", &[1, 2, 3, 4, 5], 12);
    asked.sampling.n = Some(2);
    let mut generation = submit(&handle, asked);
    eventually("both sequences", || parked(&bench) == 2);
    let mut tokens = [0, 0];
    while let Some(output) = generation.next_blocking() {
        let output = output.unwrap();
        tokens[output.index as usize] += output.token_ids.len();
    }
    assert_eq!(tokens, [12, 12]);
}

#[test]
fn a_reader_as_quick_as_the_engine_loses_no_wake_up() {
    let bench = Bench::with(|options| options.engine.scheduling.max_stream_buffer = 1);
    bench.finish_steps(20_000);
    let handle = bench.handle();
    let readers: Vec<_> = (0..4)
        .map(|reader| {
            let handle = handle.clone();
            thread::spawn(move || {
                for round in 0..20 {
                    let id = format!("{reader}/{round}");
                    let tokens = loop {
                        match handle.submit(handle.validate(request(&id, &[1, 2, 3], 30)).unwrap()) {
                            Ok(generation) => break collect(generation).unwrap().0,
                            Err(RequestError::QueueFull { .. }) => thread::yield_now(),
                            Err(other) => panic!("{other:?}"),
                        }
                    };
                    assert_eq!(tokens, (303..333).collect::<Vec<_>>());
                }
            })
        })
        .collect();
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    assert!(handle.stats().counters.parked > 0, "nobody was ever parked: the test shows nothing");
}
