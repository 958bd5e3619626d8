//! What clients and operators see of the scheduler: prefix hits, priorities, refusals, explanations, KV events.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use common::{Harness, alone, endless, greedy, narrow, text};
use tidemill::{config::GrpcConfig, grpc::auth::ApiKeys};
use tidemill_engine::scheduler::Policy;
use tidemill_proto::v1::{
    ChatMessage, ChatPrompt, ExplainRequest, ExplainResponse, FinishReason, GenerateRequest, KvEvent,
    RequestState, ResetPrefixCacheRequest, TokenizeRequest, WatchKvEventsRequest, WatchKvEventsResponse,
    generate_request::Prompt, kv_event, life_event::What, tokenize_request::Input, wait_reason::Reason,
};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

const STORY: &str = "Once upon a time, in a small house at the edge of a large forest, there lived a fox who counted tokens. \
                     Every morning the fox wrote down how many there were, and every evening it read the list aloud.";

fn named(id: &str, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { request_id: id.into(), ..request }
}

async fn explain(harness: &mut Harness, id: &str) -> Result<ExplainResponse, Status> {
    let request = ExplainRequest { request_id: id.into() };
    harness.control.explain(request).await.map(tonic::Response::into_inner)
}

fn what(explanation: &ExplainResponse) -> Vec<&What> {
    explanation.life.iter().map(|event| event.what.as_ref().expect("says what happened")).collect()
}

/// A request's usage: prompt tokens, and those of them that were found in the cache.
async fn cached(harness: &mut Harness, request: impl tonic::IntoRequest<GenerateRequest>) -> (u32, u32) {
    let stream = harness.inference.generate(request).await.unwrap().into_inner();
    let completion = common::collect(stream).await.unwrap().remove(0);
    let usage = completion.last.usage.unwrap();
    (usage.prompt_tokens, usage.cached_tokens)
}

#[tokio::test]
async fn a_queued_request_is_told_what_it_waits_for_and_a_running_one_what_it_did() {
    let mut harness = Harness::tuned(narrow).await;
    let running = harness.started(alone("running")).await;
    let queued = named("queued", GenerateRequest { tenant: "fox".into(), ..text(STORY, greedy(3)) });
    let waiting = harness.inference.generate(queued).await.unwrap().into_inner();
    harness.until("waiting", |stats| stats.num_requests_waiting == 1).await;
    let explanation = explain(&mut harness, "queued").await.unwrap();
    assert_eq!(explanation.state(), RequestState::Queued, "{explanation:?}");
    let reason = explanation.waits_for.clone().expect("waits for something");
    assert!(matches!(&reason.reason, Some(Reason::Rows(rows)) if rows.max_num_seqs == 1), "{reason:?}");
    assert!(reason.text.contains('1') && reason.text.contains("row"), "{reason:?}");
    assert_eq!((explanation.tenant.as_str(), explanation.kv_blocks), ("fox", 0));
    assert!(explanation.prompt_tokens > 20 && matches!(what(&explanation)[..], [What::Queued(_)]));

    let explanation = explain(&mut harness, "running").await.unwrap();
    assert_eq!((explanation.state(), &explanation.waits_for), (RequestState::Decode, &None));
    assert!(explanation.kv_blocks > 0 && explanation.completion_tokens > 0, "{explanation:?}");
    let expected = [
        matches!(what(&explanation)[0], What::Queued(_)),
        matches!(what(&explanation)[1], What::Admitted(_)),
        matches!(what(&explanation)[2], What::Chunk(chunk) if chunk.computed == explanation.prompt_tokens),
        matches!(what(&explanation)[3], What::FirstToken(_)),
    ];
    assert_eq!(expected, [true; 4], "{explanation:?}");
    let times: Vec<f64> = explanation.life.iter().map(|event| event.seconds).collect();
    assert!(times.is_sorted() && times[0] >= 0.0, "{times:?}");

    drop(running);
    common::collect(waiting).await.unwrap();
    let explanation = explain(&mut harness, "queued").await.unwrap();
    assert_eq!((explanation.state(), explanation.completion_tokens), (RequestState::Ended, 3));
    let last = what(&explanation).pop().cloned();
    assert_eq!(last, Some(What::Finished(FinishReason::Length.into())), "{explanation:?}");
    let dropped = explain(&mut harness, "running").await.unwrap();
    assert!(matches!(what(&dropped).pop(), Some(What::Dropped(_))), "{dropped:?}");
}

#[tokio::test]
async fn a_deadline_that_passed_stands_in_the_life_and_unknown_ids_are_not_found() {
    let mut harness = Harness::tuned(narrow).await;
    let _running = harness.started(alone("running")).await;
    let mut request = Request::new(named("late", text("Once", greedy(1))));
    request.metadata_mut().insert("grpc-timeout", "80m".parse().unwrap());
    let stream = harness.inference.generate(request).await.unwrap().into_inner();
    assert_eq!(common::collect(stream).await.unwrap_err().code(), Code::DeadlineExceeded);
    let explanation = explain(&mut harness, "late").await.unwrap();
    let Some(What::Failed(failed)) = what(&explanation).pop() else { panic!("{explanation:?}") };
    assert_eq!(failed.status, "DEADLINE_EXCEEDED");

    let status = explain(&mut harness, "never seen").await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound, "{status:?}");
    for id in ["", &"x".repeat(257)] {
        let status = explain(&mut harness, id).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    }
}

#[tokio::test]
async fn a_second_identical_prompt_is_found_in_the_cache_and_another_salt_finds_nothing() {
    let mut harness = Harness::start().await;
    let first = harness.complete(text(STORY, greedy(20))).await;
    assert_eq!(first.last.usage.unwrap().cached_tokens, 0);
    let second = harness.complete(text(STORY, greedy(20))).await;
    let usage = second.last.usage.unwrap();
    // Whole blocks of all but the last token, whose logits are needed.
    assert_eq!(usage.cached_tokens, (usage.prompt_tokens - 1) / 16 * 16, "{usage:?}");
    assert_eq!(second.ids, first.ids, "a hit changes no token");
    let salted = |salt: &str| GenerateRequest { cache_salt: salt.into(), ..text(STORY, greedy(20)) };
    assert_eq!(cached(&mut harness, salted("a")).await.1, 0);
    assert_eq!(cached(&mut harness, salted("b")).await.1, 0);
    assert!(cached(&mut harness, salted("a")).await.1 > 0);
    let stats = harness.at_rest().await;
    assert!(stats.kv_blocks_cached > 0, "{stats:?}");
    assert_eq!(stats.prefix_cache_hits_total, u64::from(2 * usage.cached_tokens), "{stats:?}");
    assert_eq!(stats.prefix_cache_queries_total, u64::from(5 * usage.prompt_tokens), "{stats:?}");
}

#[tokio::test]
async fn clients_with_other_keys_share_nothing() {
    let keys = ApiKeys::new(vec!["fox".into(), "owl".into()]).unwrap();
    let mut harness = Harness::with(|_| (), GrpcConfig { keys, ..GrpcConfig::loopback() }).await;
    let as_client = |key: &str| {
        let mut request = Request::new(text(STORY, greedy(1)));
        request.metadata_mut().insert("x-api-key", key.parse().unwrap());
        request
    };
    assert_eq!(cached(&mut harness, as_client("fox")).await.1, 0);
    assert_eq!(cached(&mut harness, as_client("owl")).await.1, 0, "another key");
    assert!(cached(&mut harness, as_client("fox")).await.1 > 0);
    assert!(cached(&mut harness, as_client("owl")).await.1 > 0);
}

#[tokio::test]
async fn without_prefix_caching_nothing_is_kept() {
    let mut harness = Harness::tuned(|config| config.scheduling.enable_prefix_caching = false).await;
    for _ in 0..2 {
        assert_eq!(cached(&mut harness, text(STORY, greedy(20))).await.1, 0);
    }
    assert_eq!(harness.at_rest().await.kv_blocks_cached, 0);
}

#[tokio::test]
async fn the_next_turn_of_a_chat_reuses_what_the_last_one_generated() {
    let mut harness = Harness::start().await;
    let message = |role: &str, content: &str| ChatMessage {
        role: role.into(),
        content: content.into(),
        ..ChatMessage::default()
    };
    let chat = |messages: &[ChatMessage]| {
        let chat = ChatPrompt { messages: messages.to_vec(), ..ChatPrompt::default() };
        GenerateRequest { prompt: Some(Prompt::Chat(chat)), ..text("", greedy(100)) }
    };
    let mut turns = vec![message("user", "What is a KV cache?")];
    let answer = harness.complete(chat(&turns)).await;
    let first = answer.last.usage.unwrap();
    assert!(first.completion_tokens > 20, "long enough to fill a block: {first:?}");
    turns.extend([message("assistant", &answer.text), message("user", "And what is a block?")]);
    let (_, found) = cached(&mut harness, chat(&turns)).await;
    assert!(found > first.prompt_tokens, "{found} of {first:?}");
}

#[tokio::test]
async fn the_lowest_priority_value_is_served_first_and_takes_the_place_of_higher_ones() {
    let mut harness = Harness::tuned(|config| {
        config.max_num_seqs = Some(1);
        config.scheduling.policy = Policy::Priority;
    })
    .await;
    let running = harness.started(alone("running")).await;
    // What is more urgent than what runs takes its place.
    let urgent = GenerateRequest { priority: -1, ..text("Once", greedy(3)) };
    assert_eq!(harness.complete(urgent).await.ids.len(), 3);
    let explanation = explain(&mut harness, "running").await.unwrap();
    assert!(explanation.num_preemptions >= 1, "{explanation:?}");
    // What is less urgent waits, and goes in order of its priority, not of its arrival.
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut clients = Vec::new();
    for (number, priority) in [7, 3, 5].into_iter().enumerate() {
        let stream =
            harness.inference.generate(GenerateRequest { priority, ..text("Once", greedy(3)) }).await;
        let (stream, order) = (stream.unwrap().into_inner(), order.clone());
        clients.push(tokio::spawn(async move {
            common::collect(stream).await.unwrap();
            order.lock().unwrap().push(priority);
        }));
        harness.until("waiting", |stats| stats.num_requests_waiting as usize == number + 1).await;
    }
    drop(running);
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(*order.lock().unwrap(), [3, 5, 7]);
}

#[tokio::test]
async fn a_preempted_stream_gives_the_tokens_that_it_gives_alone() {
    let mut harness = Harness::tuned(|config| {
        config.max_num_seqs = Some(1);
        config.scheduling.policy = Policy::Priority;
    })
    .await;
    let request = || text(STORY, tidemill_proto::v1::SamplingParams { ignore_eos: true, ..greedy(150) });
    let expected = harness.complete(request()).await.ids;
    let mut stream = harness.started(request()).await;
    for _ in 0..4 {
        let urgent = GenerateRequest { priority: -1, ..text("Once", greedy(2)) };
        assert_eq!(harness.complete(urgent).await.ids.len(), 2);
        stream.message().await.unwrap().expect("goes on");
    }
    drop(stream);
    let stream = harness.inference.generate(request()).await.unwrap().into_inner();
    let urgent = GenerateRequest { priority: -1, ..text("Once", greedy(2)) };
    harness.complete(urgent).await;
    let completion = common::collect(stream).await.unwrap().remove(0);
    assert_eq!(completion.ids, expected);
}

#[tokio::test]
async fn a_queue_that_is_full_by_tokens_and_a_wait_that_is_too_long_say_when_to_retry() {
    let mut harness = Harness::tuned(|config| {
        config.max_num_seqs = Some(1);
        config.scheduling.max_num_queued_tokens = Some(40);
        config.scheduling.max_queue_time = Some(Duration::from_millis(300));
    })
    .await;
    // Eight completions one after the other: longer than anything may wait.
    let _running = harness.started(endless("running")).await;
    let waiting = harness.inference.generate(text(STORY, greedy(1))).await.unwrap().into_inner();
    let refused = harness.generate(text(STORY, greedy(1))).await.unwrap_err();
    let overdue = common::collect(waiting).await.unwrap_err();
    for status in [refused, overdue] {
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        let retry = status.get_details_retry_info().expect("has RetryInfo").retry_delay.unwrap();
        assert!(retry >= Duration::from_millis(50) && retry <= Duration::from_secs(60), "{retry:?}");
    }
}

async fn next(watch: &mut tonic::Streaming<WatchKvEventsResponse>) -> WatchKvEventsResponse {
    tokio::time::timeout(Duration::from_secs(5), watch.message()).await.expect("in time").unwrap().unwrap()
}

fn stored(event: &KvEvent) -> &kv_event::Stored {
    let Some(kv_event::Event::Stored(stored)) = &event.event else { panic!("{event:?}") };
    stored
}

#[tokio::test]
async fn a_watcher_of_the_cache_learns_what_is_there_what_comes_and_when_it_is_cleared() {
    let mut harness = Harness::tuned(|config| config.scheduling.enable_kv_cache_events = true).await;
    let watch = |include_token_ids| WatchKvEventsRequest { include_token_ids };
    let mut early = harness.control.watch_kv_events(watch(true)).await.unwrap().into_inner();
    let snapshot = next(&mut early).await;
    assert!(snapshot.is_snapshot && snapshot.events.is_empty() && !snapshot.continues, "{snapshot:?}");
    let input = Some(Input::Text(STORY.into()));
    let request = TokenizeRequest { input, add_special_tokens: None };
    let prompt = harness.inference.tokenize(request).await.unwrap().into_inner().token_ids;
    harness.complete(text(STORY, greedy(1))).await;

    let (mut sequence, mut blocks) = (snapshot.sequence, Vec::new());
    while blocks.len() < prompt.len() / 16 {
        let batch = next(&mut early).await;
        assert!(!batch.is_snapshot && batch.sequence == sequence + 1, "{batch:?} after {sequence}");
        sequence = batch.sequence;
        blocks.extend(batch.events.iter().map(|event| stored(event).clone()));
    }
    for (number, block) in blocks.iter().enumerate() {
        assert_eq!(block.token_ids, prompt[number * 16..][..16]);
        let parent = number.checked_sub(1).map_or(&[][..], |parent| &blocks[parent].hash);
        assert_eq!((block.hash.len(), &block.parent_hash[..]), (32, parent));
    }

    let mut late = harness.control.watch_kv_events(watch(false)).await.unwrap().into_inner();
    let snapshot = next(&mut late).await;
    assert!(snapshot.is_snapshot, "{snapshot:?}");
    let mut known: Vec<_> = snapshot.events.iter().map(|event| stored(event).hash.clone()).collect();
    assert!(snapshot.events.iter().all(|event| stored(event).token_ids.is_empty()), "nobody asked for them");
    let mut expected: Vec<_> = blocks.iter().map(|block| block.hash.clone()).collect();
    known.sort();
    expected.sort();
    assert_eq!(known, expected);

    harness.at_rest().await;
    let freed = harness.control.reset_prefix_cache(ResetPrefixCacheRequest {}).await.unwrap().into_inner();
    assert_eq!(freed.blocks_freed as usize, blocks.len());
    for watch in [&mut early, &mut late] {
        let batch = next(watch).await;
        assert!(
            matches!(batch.events[..], [KvEvent { event: Some(kv_event::Event::Cleared(_)) }]),
            "{batch:?}"
        );
    }
    assert_eq!(harness.stats().await.kv_blocks_cached, 0);
    assert_eq!(cached(&mut harness, text(STORY, greedy(1))).await.1, 0, "forgotten");
}

#[tokio::test]
async fn a_watch_of_the_cache_ends_with_the_server_and_is_refused_where_there_is_nothing_to_tell() {
    let mut harness = Harness::start().await;
    let status = harness.control.watch_kv_events(WatchKvEventsRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("--enable-kv-cache-events"), "{status:?}");

    let mut harness = Harness::tuned(|config| config.scheduling.enable_kv_cache_events = true).await;
    let request = WatchKvEventsRequest::default();
    let mut watch = harness.control.watch_kv_events(request).await.unwrap().into_inner();
    next(&mut watch).await;
    harness.server.take().unwrap().stop(Duration::from_secs(1)).await;
    assert!(matches!(watch.message().await, Ok(None)), "the stream ends in peace");
}
