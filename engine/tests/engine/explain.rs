//! What the engine says of a request and of itself.

use std::time::Duration;

use tidemill_engine::{
    ErrorCode, Histogram,
    explain::{Explanation, Life, RequestState},
    ids::{RequestId, TenantId},
    output::{AbortStage, FinishReason},
    request::GenerateRequest,
    scheduler::WaitReason,
};

use crate::rig::{Bench, block_on, collect, eventually, request, submit};

fn explain(bench: &Bench, id: &str) -> Option<Explanation> {
    block_on(bench.handle().explain(RequestId::new(id))).unwrap()
}

fn lived(explanation: &Explanation) -> Vec<Life> {
    assert!(explanation.life.is_sorted_by_key(|event| event.at));
    explanation.life.iter().map(|event| event.what).collect()
}

#[test]
fn a_request_is_explained_at_every_stage_and_after_its_end() {
    let bench = Bench::looking_ahead(false);
    let handle = bench.handle();
    assert_eq!(explain(&bench, "nobody"), None);
    let prompt: Vec<u32> = (1..=12).collect();
    let asked = GenerateRequest { tenant: TenantId::new("t"), ..request("a", &prompt, 3) };
    let a = submit(&handle, asked);
    bench.step_started();
    let others: Vec<_> = ["b", "c", "d"].map(|id| submit(&handle, request(id, &[1], 40))).into();

    let queued = explain(&bench, "d").unwrap();
    assert_eq!((queued.state, queued.ahead, queued.kv_blocks), (RequestState::Queued, 2, 0));
    assert_eq!(queued.waits_for, Some(WaitReason::Turn { ahead: 2 }));
    assert_eq!(lived(&queued), [Life::Queued]);

    let prefill = explain(&bench, "a").unwrap();
    assert_eq!((prefill.state, prefill.waits_for), (RequestState::Prefill, None));
    assert_eq!((prefill.prompt_tokens, prefill.kv_blocks, prefill.tenant.as_str()), (12, 3, "t"));
    let admitted = Life::Admitted { cached_tokens: 0 };
    assert_eq!(lived(&prefill), [Life::Queued, admitted]);

    bench.finish_step();
    bench.step_started();
    bench.finish_step();
    bench.step_started();
    let decode = explain(&bench, "a").unwrap();
    assert_eq!((decode.state, decode.completion_tokens), (RequestState::Decode, 1));
    let chunks = [Life::Chunk { tokens: 8, computed: 8 }, Life::Chunk { tokens: 4, computed: 12 }];
    let so_far = [Life::Queued, admitted, chunks[0], chunks[1], Life::FirstToken];
    assert_eq!(lived(&decode), so_far);
    let rows = explain(&bench, "d").unwrap();
    assert_eq!(rows.waits_for, Some(WaitReason::Rows { max_num_seqs: 2 }));

    bench.finish_steps(2);
    collect(a).unwrap();
    let ended = explain(&bench, "a").unwrap();
    assert_eq!((ended.state, ended.completion_tokens, ended.kv_blocks), (RequestState::Ended, 3, 0));
    assert_eq!(lived(&ended)[..5], so_far);
    assert_eq!(lived(&ended)[5..], [Life::Finished(FinishReason::Length)]);
    drop(others);
    eventually("gone", || explain(&bench, "d").unwrap().life.last().unwrap().what == Life::Dropped);
}

#[test]
fn a_preempted_request_says_so() {
    // 16 blocks of 4 tokens: two that need 13 each do not fit.
    let bench = Bench::new();
    let handle = bench.handle();
    let old = submit(&handle, request("old", &[1, 2], 50));
    let young = submit(&handle, request("young", &[3, 4], 50));
    let mut steps = 0;
    while handle.stats().counters.preemptions == 0 {
        bench.step_started();
        bench.finish_step();
        steps += 1;
        assert!(steps < 60, "nobody was preempted");
    }
    let explained = explain(&bench, "young").unwrap();
    assert_eq!((explained.state, explained.num_preemptions), (RequestState::Preempted, 1));
    assert!(matches!(explained.waits_for, Some(WaitReason::Blocks { .. })), "{explained:?}");
    bench.finish_steps(500);
    assert_eq!(collect(old).unwrap().0, collect(young).unwrap().0, "its stream does not show it");
    let life = lived(&explain(&bench, "young").unwrap());
    let at = life.iter().position(|what| *what == Life::Preempted).unwrap();
    assert!(matches!(life[at + 1], Life::Resumed { .. }), "{life:?}");
}

#[test]
fn lives_are_handed_over_when_they_end_and_lost_ones_are_counted() {
    let (lives, ended) = async_channel::bounded(3);
    let bench = Bench::with(|options| options.engine.lives = Some(lives));
    let handle = bench.handle();
    bench.finish_steps(50);
    let parent: std::sync::Arc<str> = "00-trace".into();
    let asked = GenerateRequest { trace_parent: Some(parent.clone()), ..request("a", &[1, 2], 2) };
    collect(submit(&handle, asked)).unwrap();
    let life = ended.recv_blocking().unwrap();
    assert_eq!((&*life.explanation.id.to_string(), life.trace_parent), ("a", Some(parent)));
    assert_eq!(life.explanation.life.last().unwrap().what, Life::Finished(FinishReason::Length));
    assert!(life.submitted.elapsed() < Duration::from_secs(60));
    let deadline = Some(std::time::Instant::now());
    for id in 0..4 {
        let asked = GenerateRequest { deadline, ..request(&id.to_string(), &[1], 1) };
        collect(submit(&handle, asked)).unwrap_err();
    }
    eventually("one is lost", || handle.stats().counters.lives_lost == 1);
    let failed = ended.recv_blocking().unwrap().explanation;
    assert_eq!(failed.life.last().unwrap().what, Life::Failed(ErrorCode::DeadlineExceeded));
}

#[test]
fn distributions_count_what_happened() {
    let bench = Bench::looking_ahead(false);
    let handle = bench.handle();
    bench.finish_steps(100);
    for (id, tokens) in [("a", 1), ("b", 3), ("c", 5)] {
        collect(submit(&handle, request(id, &[7, 8, 9, 10, 11], tokens))).unwrap();
    }
    // The last step's statistics are out before the next command is answered.
    explain(&bench, "a");
    let stats = handle.stats();
    let h = &stats.histograms;
    let counts = |all: &[&Histogram]| all.iter().map(|h| h.count()).collect::<Vec<_>>();
    let per_request = [
        &h.time_to_first_token,
        &h.request_queue_time,
        &h.request_prefill_time,
        &h.request_decode_time,
        &h.e2e_request_latency,
    ];
    assert_eq!(counts(&per_request), [3; 5]);
    assert_eq!((h.inter_token_latency.count(), h.abort_to_free.count()), (6, 0));
    let steps = stats.counters.steps;
    assert_eq!(counts(&[&h.step_plan, &h.step_execute, &h.step_resolve, &h.iteration_tokens]), [steps; 4]);
    // The prompts, of which the later ones find a block of four, and each token but the last.
    assert_eq!(h.iteration_tokens.sum, (5 + 1 + 1 + 2 + 4) as f64);
    assert_eq!((stats.counters.prefix_cache_queries, stats.counters.prefix_cache_hits), (15, 8));
    assert!(h.e2e_request_latency.sum >= h.time_to_first_token.sum && h.step_execute.sum > 0.0);
}

#[test]
fn all_live_requests_are_aborted_at_once_and_new_ones_are_welcome() {
    let bench = Bench::looking_ahead(false);
    let handle = bench.handle();
    let running = submit(&handle, request("running", &[1, 2], 40));
    bench.step_started();
    let queued = submit(&handle, request("queued", &[1, 2], 40));
    let receipts = block_on(handle.abort_all()).unwrap();
    let told: Vec<_> = receipts.iter().map(|r| (r.id.as_str(), r.stage, r.blocks_freed)).collect();
    assert_eq!(told, [("running", AbortStage::Prefill, 1), ("queued", AbortStage::Queued, 0)]);
    let stats = handle.stats();
    assert_eq!((stats.counters.aborted, stats.histograms.abort_to_free.count()), (2, 2));
    assert!(bench.all_free());
    for generation in [running, queued] {
        assert_eq!(collect(generation).unwrap().1.finish.unwrap().reason, FinishReason::Abort);
    }
    bench.finish_steps(10);
    collect(submit(&handle, request("new", &[1, 2], 2))).unwrap();
    assert_eq!(block_on(handle.abort_all()).unwrap(), []);
}
