//! `Control` over the wire: aborts at every stage, gone clients, statistics, drain.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Harness, alone, endless, greedy, narrow, text};
use tidemill_proto::v1::{
    AbortAllRequest, AbortCause, AbortRequest, AbortStage, Activity, DrainRequest, FinishReason,
    GenerateRequest, RequestState, Stats, WatchActivityRequest, WatchActivityResponse, WatchStatsRequest,
    inference_client::InferenceClient,
};
use tonic::{Code, Streaming};

#[tokio::test]
async fn an_abort_in_decode_frees_everything_ends_the_stream_and_gives_a_receipt() {
    let mut harness = Harness::start().await;
    let stream = harness.started(endless("victim")).await;
    let owned = harness.until("decoding", |stats| stats.kv_blocks_owned >= 8).await.kv_blocks_owned;
    let receipt = harness.abort("victim").await;
    assert_eq!(receipt.stage(), AbortStage::Decode);
    assert!(receipt.blocks_freed >= owned && receipt.rows_freed == 8, "{owned} {receipt:?}");
    assert!(receipt.completion_tokens > 0 && receipt.seconds_to_free < 0.1, "{receipt:?}");
    assert_eq!(harness.stats().await.kv_blocks_owned, 0, "free when the receipt is there");
    let mut stream = stream;
    let (mut ends, mut tokens) = (0, 0);
    while let Some(message) = stream.message().await.unwrap() {
        if message.finish_reason() != FinishReason::Unspecified {
            assert_eq!(message.finish_reason(), FinishReason::Abort);
            tokens += message.usage.unwrap().completion_tokens;
            ends += 1;
        }
    }
    assert_eq!(ends, 8, "each completion ends, and the stream with status OK");
    assert_eq!(tokens, receipt.completion_tokens);
    let again = harness.abort("victim").await;
    assert_eq!((again.stage(), again.blocks_freed), (AbortStage::Finished, 0));
    assert_eq!(again.completion_tokens, receipt.completion_tokens);
    assert_eq!(harness.at_rest().await.requests_aborted_total, 1);
}

#[tokio::test]
async fn an_abort_in_the_queue_needs_no_step() {
    let mut harness = Harness::tuned(narrow).await;
    let running = harness.started(endless("running")).await;
    let request = GenerateRequest { request_id: "waiting".into(), ..text("Once", greedy(5)) };
    let waiting = harness.inference.generate(request).await.unwrap().into_inner();
    let receipt = harness.abort("waiting").await;
    assert_eq!((receipt.stage(), receipt.blocks_freed, receipt.rows_freed), (AbortStage::Queued, 0, 0));
    let completions = common::collect(waiting).await.unwrap();
    assert_eq!((completions[0].finish, completions[0].ids.len()), (FinishReason::Abort, 0));
    drop(running);
    harness.at_rest().await;
}

#[tokio::test]
async fn aborts_of_finished_and_unknown_ids_are_answers() {
    let mut harness = Harness::start().await;
    harness.complete(GenerateRequest { request_id: "done".into(), ..text("Once", greedy(3)) }).await;
    let receipt = harness.abort("done").await;
    assert_eq!((receipt.stage(), receipt.completion_tokens), (AbortStage::Finished, 3));
    let receipt = harness.abort("never seen").await;
    assert_eq!((receipt.stage(), receipt.request_id.as_str()), (AbortStage::Unspecified, "never seen"));
    let status = harness.control.abort(AbortRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn an_abort_of_all_ends_the_running_and_the_waiting_and_the_next_is_served() {
    let mut harness = Harness::tuned(narrow).await;
    let running = harness.started(alone("running")).await;
    let request = GenerateRequest { request_id: "waiting".into(), ..text("Once", greedy(5)) };
    let waiting = harness.inference.generate(request).await.unwrap().into_inner();
    harness.until("waiting", |stats| stats.num_requests_waiting == 1).await;
    let mut receipts = harness.control.abort_all(AbortAllRequest {}).await.unwrap().into_inner().receipts;
    receipts.sort_by(|a, b| a.request_id.cmp(&b.request_id));
    let seen: Vec<_> = receipts.iter().map(|r| (r.request_id.as_str(), r.stage(), r.rows_freed)).collect();
    assert_eq!(seen, [("running", AbortStage::Decode, 1), ("waiting", AbortStage::Queued, 0)]);
    assert_eq!(harness.stats().await.kv_blocks_owned, 0, "free when the receipts are there");
    assert_eq!(common::collect(waiting).await.unwrap()[0].finish, FinishReason::Abort);
    let (mut running, mut last) = (running, None);
    while let Some(message) = running.message().await.unwrap() {
        last = Some(message.finish_reason());
    }
    assert_eq!(last, Some(FinishReason::Abort), "the stream ends with status OK");
    assert_eq!(harness.complete(text("Once", greedy(2))).await.ids.len(), 2);
    let receipts = harness.control.abort_all(AbortAllRequest {}).await.unwrap().into_inner().receipts;
    assert!(receipts.is_empty(), "nothing is live: {receipts:?}");
    assert_eq!(harness.at_rest().await.requests_aborted_total, 2);
}

#[tokio::test]
async fn a_dropped_stream_frees_its_blocks_soon() {
    let mut harness = Harness::start().await;
    let stream = harness.started(endless("dropped")).await;
    drop(stream);
    let started = Instant::now();
    harness.at_rest().await;
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert_eq!(harness.stats().await.requests_aborted_total, 1);
}

#[tokio::test]
async fn a_stream_dropped_in_the_queue_leaves_the_queue() {
    let mut harness = Harness::tuned(narrow).await;
    let running = harness.started(endless("running")).await;
    let waiting = harness.inference.generate(text("Once", greedy(5))).await.unwrap().into_inner();
    drop(waiting);
    // The one place of the queue is free again.
    let started = Instant::now();
    let waiting = loop {
        match harness.inference.generate(text("Once", greedy(5))).await {
            Ok(stream) => break stream.into_inner(),
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted),
        }
        assert!(started.elapsed() < Duration::from_secs(2), "the place is not free");
    };
    drop(running);
    assert_eq!(common::collect(waiting).await.unwrap()[0].finish, FinishReason::Length);
}

#[tokio::test]
async fn a_connection_that_breaks_ends_all_its_streams() {
    let mut harness = Harness::start().await;
    let address = harness.server().address();
    // A runtime of its own, so that dropping it tears the connection down without a word.
    let client = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut client = InferenceClient::connect(format!("http://{address}")).await.unwrap();
            for id in ["a", "b"] {
                let mut stream = client.generate(alone(id)).await.unwrap().into_inner();
                stream.message().await.unwrap();
                std::mem::forget(stream);
            }
        });
    };
    tokio::task::spawn_blocking(client).await.unwrap();
    let stats = harness.at_rest().await;
    assert_eq!(stats.requests_aborted_total, 2);
}

#[tokio::test]
async fn statistics_count_and_flow() {
    let mut harness = Harness::start().await;
    let mut readings =
        harness.control.watch_stats(WatchStatsRequest { interval_ms: Some(10) }).await.unwrap().into_inner();
    let first = readings.message().await.unwrap().unwrap().stats.unwrap();
    assert_eq!((first.kv_blocks_free, first.kv_blocks_owned), (first.kv_blocks_total, 0));
    let completion = harness.complete(text("Once upon a time", greedy(9))).await;
    let prompt_tokens = u64::from(completion.last.usage.unwrap().prompt_tokens);
    let stats = harness.at_rest().await;
    assert_eq!((stats.prompt_tokens_total, stats.generation_tokens_total), (prompt_tokens, 9));
    assert_eq!((stats.requests_finished_total, stats.steps_total), (1, 9));
    distributions_count(&stats);
    let started = Instant::now();
    loop {
        let stats = readings.message().await.unwrap().unwrap().stats.unwrap();
        if stats.requests_finished_total == 1 {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(2), "the stream lags");
    }
    harness.server.take().unwrap().stop(Duration::from_secs(1)).await;
    while let Some(reading) = readings.message().await.unwrap() {
        assert!(reading.stats.is_some());
    }
}

/// After one request of 9 tokens.
fn distributions_count(stats: &Stats) {
    let histograms = [
        ("time to first token", &stats.time_to_first_token_seconds, 1),
        ("inter-token latency", &stats.inter_token_latency_seconds, 8),
        ("end to end", &stats.e2e_request_latency_seconds, 1),
        ("queue", &stats.request_queue_time_seconds, 1),
        ("prefill", &stats.request_prefill_time_seconds, 1),
        ("decode", &stats.request_decode_time_seconds, 1),
        ("tokens per step", &stats.iteration_tokens_total, 9),
        ("aborts", &stats.abort_to_free_seconds, 0),
        ("plan", &stats.step_plan_seconds, 9),
        ("execute", &stats.step_execute_seconds, 9),
        ("resolve", &stats.step_resolve_seconds, 9),
    ];
    for (name, histogram, count) in histograms {
        let histogram = histogram.as_ref().unwrap();
        assert_eq!(histogram.counts.len(), histogram.bounds.len() + 1, "{name}");
        assert!(histogram.bounds.is_sorted_by(|a, b| a < b), "{name}: {:?}", histogram.bounds);
        assert_eq!(histogram.counts.iter().sum::<u64>(), count, "{name}: {histogram:?}");
        assert_eq!(histogram.sum > 0.0, count > 0, "{name}: {histogram:?}");
    }
    let tokens = stats.iteration_tokens_total.as_ref().unwrap().sum;
    assert_eq!(tokens as u64, stats.prompt_tokens_total + 8, "nothing is computed from the last token");
}

/// Reads on until the engine is seen to be so.
async fn seen(
    readings: &mut Streaming<WatchActivityResponse>,
    what: &str,
    done: impl Fn(&Activity) -> bool,
) -> Activity {
    let started = Instant::now();
    loop {
        let activity = readings.message().await.unwrap().unwrap().activity.unwrap();
        if done(&activity) {
            return activity;
        }
        assert!(started.elapsed() < Duration::from_secs(5), "never {what}: {activity:?}");
    }
}

#[tokio::test]
async fn the_engine_is_watched_at_work() {
    let mut harness = Harness::tuned(narrow).await;
    let request = WatchActivityRequest { interval_ms: Some(50) };
    let mut readings = harness.control.watch_activity(request).await.unwrap().into_inner();
    let idle = readings.message().await.unwrap().unwrap().activity.unwrap();
    let map = idle.blocks.unwrap();
    assert_eq!((idle.max_num_seqs, map.cells.len()), (1, map.total.div_ceil(map.blocks_per_cell) as usize));
    assert!(idle.rows.is_empty() && map.cells.iter().all(|&cell| cell == 0), "{map:?}");

    let running = harness.started(alone("running")).await;
    let request = GenerateRequest { request_id: "waiting".into(), ..text("Once", greedy(5)) };
    let waiting = harness.inference.generate(request).await.unwrap().into_inner();
    let busy = seen(&mut readings, "one runs and one waits", |activity| activity.num_waiting == 1).await;
    let row = &busy.rows[0];
    assert_eq!((row.request_id.as_str(), row.stage()), ("running", RequestState::Decode));
    assert!(row.completion_tokens > 0 && row.computed_tokens >= row.prompt_tokens, "{row:?}");
    assert_eq!((busy.waiting.len(), busy.waiting[0].request_id.as_str()), (1, "waiting"));
    let drawn = busy.blocks.unwrap().cells.iter().filter(|&&cell| cell == 3).count();
    assert_eq!(drawn, row.kv_blocks as usize);

    drop(running);
    let after =
        seen(&mut readings, "the dropped stream's receipt", |activity| !activity.aborts.is_empty()).await;
    let past = &after.aborts[0];
    let receipt = past.receipt.as_ref().unwrap();
    assert_eq!((past.cause(), receipt.stage()), (AbortCause::Dropped, AbortStage::Decode));
    assert_eq!((receipt.request_id.as_str(), receipt.rows_freed), ("running", 1));
    assert!(receipt.blocks_freed > 0 && receipt.seconds_to_free < 0.1, "{receipt:?}");
    assert!(past.at_uptime_seconds > 0.0 && past.at_uptime_seconds <= after.uptime_seconds);
    assert_eq!(common::collect(waiting).await.unwrap()[0].finish, FinishReason::Length);
    let empty = seen(&mut readings, "empty", |activity| activity.rows.is_empty()).await;
    assert!(empty.blocks.unwrap().cells.iter().all(|&cell| cell < 2), "free or cached");

    let status = harness.control.watch_activity(WatchActivityRequest { interval_ms: Some(49) }).await;
    assert_eq!(status.unwrap_err().code(), Code::InvalidArgument);
    harness.server.take().unwrap().stop(Duration::from_secs(1)).await;
    while let Some(reading) = readings.message().await.unwrap() {
        assert!(reading.activity.is_some());
    }
}

#[tokio::test]
async fn a_drain_lets_the_running_finish_and_refuses_the_new() {
    let mut harness = Harness::start().await;
    let stream = harness
        .started(text(
            "Once upon a time",
            tidemill_proto::v1::SamplingParams { ignore_eos: true, ..greedy(400) },
        ))
        .await;
    let mut control = harness.control.clone();
    let drain =
        tokio::spawn(async move { control.drain(DrainRequest { timeout_seconds: Some(20.0) }).await });
    harness.until("draining", |stats| stats.draining).await;
    let status = harness.generate(text("Once", greedy(1))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let drained = drain.await.unwrap().unwrap().into_inner();
    assert_eq!((drained.finished, drained.cut_off), (1, 0));
    let mut stream = stream;
    let mut last = None;
    while let Some(message) = stream.message().await.unwrap() {
        last = Some(message);
    }
    assert_eq!(last.unwrap().finish_reason(), FinishReason::Length);
    assert!(harness.at_rest().await.draining);
}

#[tokio::test]
async fn a_drain_cuts_off_what_outlasts_its_grace() {
    let mut harness = Harness::tuned(narrow).await;
    let mut running = harness.started(endless("running")).await;
    let waiting = harness.inference.generate(text("Once", greedy(1))).await.unwrap().into_inner();
    // The other seven completions of the one that runs, and this one.
    harness.until("waiting", |stats| stats.num_requests_waiting == 8).await;
    let request = DrainRequest { timeout_seconds: Some(0.05) };
    let drained = harness.control.drain(request).await.unwrap().into_inner();
    assert_eq!((drained.finished, drained.cut_off), (0, 2));
    let status = loop {
        match running.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("ended well"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(common::collect(waiting).await.unwrap_err().code(), Code::Unavailable);
    harness.at_rest().await;
}

#[tokio::test]
async fn a_storm_of_given_up_streams_leaves_nothing_behind_and_a_survivor_unharmed() {
    let mut harness = Harness::tuned(|config| config.scheduling.max_num_queued_reqs = 4096).await;
    let calm =
        text("Once upon a time", tidemill_proto::v1::SamplingParams { ignore_eos: true, ..greedy(200) });
    let expected = harness.complete(calm.clone()).await.ids;
    let mut client = harness.inference.clone();
    let survivor =
        tokio::spawn(async move { common::collect(client.generate(calm).await.unwrap().into_inner()).await });
    let mut storm = Vec::new();
    for worker in 0..8_u64 {
        let mut client = harness.inference.clone();
        storm.push(tokio::spawn(async move {
            for number in 0..60_u64 {
                let request = alone(&format!("storm-{worker}-{number}"));
                // Given up at once, after the headers, or after some tokens.
                match number % 3 {
                    0 => drop(
                        tokio::time::timeout(Duration::from_micros(number * 20), client.generate(request))
                            .await,
                    ),
                    1 => drop(client.generate(request).await.unwrap()),
                    _ => {
                        let mut stream = client.generate(request).await.unwrap().into_inner();
                        let patience = Duration::from_millis(number / 4);
                        drop(tokio::time::timeout(patience, stream.message()).await);
                    }
                }
            }
        }));
    }
    for worker in storm {
        worker.await.unwrap();
    }
    assert_eq!(survivor.await.unwrap().unwrap()[0].ids, expected);
    let stats = harness.at_rest().await;
    assert_eq!(stats.requests_finished_total, 2, "{stats:?}");
    assert!(stats.requests_aborted_total >= 320, "{stats:?}");
}
