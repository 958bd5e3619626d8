//! Requests for embeddings: their way through the engine, and every way out of it.

use std::{
    thread,
    time::{Duration, Instant},
};

use tidemill_engine::{
    EngineHandle, ErrorCode, Histogram, PendingEmbedding, Pooling, RequestError,
    explain::Life,
    ids::{RequestId, TokenId},
    output::{AbortStage, FinishReason},
    request::{EmbedRequest, Prompt},
};

use crate::rig::{
    BLOCK_SIZE, BLOCKS, Bench, LOSS, NAN, POISON, WIDTH, block_on, collect, eventually, request, state,
    submit,
};

fn embedding(id: &str, prompt: &[u32]) -> EmbedRequest {
    let prompt = Prompt::TokenIds(prompt.iter().copied().map(TokenId).collect());
    EmbedRequest { id: Some(RequestId::new(id)), ..EmbedRequest::new(prompt) }
}

fn embed(handle: &EngineHandle, request: EmbedRequest) -> PendingEmbedding {
    handle.submit_embed(handle.validate_embed(request).unwrap()).unwrap()
}

fn ids(len: u32) -> Vec<u32> {
    (1..=len).collect()
}

fn count(histogram: &Histogram) -> u64 {
    histogram.counts.iter().sum()
}

/// The mean of the states of the positions before `len`.
fn mean(len: usize) -> Vec<f32> {
    let sum = |at: usize| (0..len).map(|position| f64::from(state(position)[at])).sum::<f64>();
    (0..WIDTH).map(|at| (sum(at) / len as f64) as f32).collect()
}

fn pooled(pooling: Pooling) -> Bench {
    Bench::with(|options| options.pooling = pooling)
}

#[test]
fn a_prompt_in_chunks_gives_the_pooled_states_and_nothing_is_sampled() {
    for (pooling, expected) in
        [(Pooling::Mean, mean(20)), (Pooling::Last, state(19).to_vec()), (Pooling::Cls, state(0).to_vec())]
    {
        let bench = pooled(pooling);
        let handle = bench.handle();
        let pending = embed(&handle, embedding("e", &ids(20)));
        bench.finish_steps(3);
        let plans = [(); 3].map(|()| bench.step_started());
        assert!(plans.iter().all(|plan| plan.rows[0].sample.is_none() && plan.rows[0].targets.is_empty()));
        let answer = pending.wait_blocking().unwrap();
        assert_eq!((answer.values, answer.prompt_tokens, answer.cached_tokens), (expected, 20, 0));
        assert!(bench.all_free() && bench.started.is_empty(), "three chunks of at most 8, and no step more");
        let stats = handle.stats();
        assert_eq!((stats.counters.finished, stats.counters.generation_tokens), (1, 0));
        assert_eq!(stats.counters.prompt_tokens, 20);
        let life = block_on(handle.explain(RequestId::new("e"))).unwrap().unwrap().life;
        let what: Vec<Life> = life.into_iter().map(|event| event.what).collect();
        let chunk = |tokens, computed| Life::Chunk { tokens, computed };
        let expected = [
            Life::Queued,
            Life::Admitted { cached_tokens: 0 },
            chunk(8, 8),
            chunk(8, 16),
            chunk(4, 20),
            Life::Finished(FinishReason::Stop),
        ];
        assert_eq!(what, expected);
        let histograms = stats.histograms;
        let counts = [&histograms.e2e_request_latency, &histograms.request_prefill_time].map(count);
        assert_eq!(counts, [1, 1]);
        let none = [&histograms.time_to_first_token, &histograms.request_decode_time].map(count);
        assert_eq!(none, [0, 0], "it has no token, and decodes nothing");
    }
}

#[test]
fn embeddings_and_generations_share_steps_and_get_what_is_theirs() {
    let bench = Bench::new();
    let handle = bench.handle();
    bench.finish_steps(20);
    let generation = submit(&handle, request("g", &[1, 2, 3], 6));
    let pending = [embed(&handle, embedding("a", &ids(11))), embed(&handle, embedding("b", &[7]))];
    assert_eq!(collect(generation).unwrap().0, [303, 304, 305, 306, 307, 308]);
    let [a, b] = pending.map(|pending| block_on(pending.wait()).unwrap().values);
    assert_eq!((a, b), (mean(11), mean(1)));
}

#[test]
fn an_embedding_is_cut_and_then_normalised() {
    let bench = pooled(Pooling::Last);
    let handle = bench.handle();
    bench.finish_steps(20);
    let values = |dimensions, normalize| {
        let request = EmbedRequest { dimensions, normalize, ..embedding("", &ids(4)) };
        embed(&handle, request).wait_blocking().unwrap().values
    };
    assert_eq!(values(None, None), [1.0, 3.0, 2.25], "the folder does not normalise");
    assert_eq!(values(Some(2), Some(false)), [1.0, 3.0]);
    let length = 10_f64.sqrt();
    assert_eq!(values(Some(2), Some(true)), [1.0, 3.0].map(|x: f64| (x / length) as f32));
    assert_eq!(values(Some(1), Some(true)), [1.0]);
    assert_eq!(values(Some(3), None), values(None, None));
}

#[test]
fn an_abort_ends_it_at_every_stage_and_frees_at_once() {
    let bench = Bench::new();
    let handle = bench.handle();
    let prefill = embed(&handle, embedding("prefill", &ids(30)));
    let busy = submit(&handle, request("busy", &[1, 2], 30));
    let queued = embed(&handle, embedding("queued", &ids(5)));
    bench.step_started();
    bench.step_started();
    let receipt = handle.abort_blocking(RequestId::new("queued")).unwrap();
    assert_eq!((receipt.stage, receipt.blocks_freed, receipt.rows_freed), (AbortStage::Queued, 0, 0));
    let receipt = handle.abort_blocking(RequestId::new("prefill")).unwrap();
    assert_eq!((receipt.stage, receipt.blocks_freed, receipt.rows_freed), (AbortStage::Prefill, 8, 1));
    for pending in [queued, prefill] {
        let error = pending.wait_blocking().unwrap_err();
        assert_eq!((&error, error.code()), (&RequestError::Aborted, ErrorCode::Cancelled));
    }
    drop(busy);
    eventually("all is free, while two steps are in flight", || bench.all_free());
    let receipt = handle.abort_blocking(RequestId::new("prefill")).unwrap();
    assert_eq!(receipt.stage, AbortStage::Finished);
    assert_eq!(handle.stats().counters.aborted, 3);
}

#[test]
fn dropping_what_is_pending_or_its_future_is_an_abort_and_dropping_what_is_there_is_none() {
    let bench = Bench::new();
    let handle = bench.handle();
    let pending = embed(&handle, embedding("dropped", &ids(30)));
    bench.step_started();
    drop(pending);
    eventually("its blocks are free", || bench.all_free());
    // The two chunks that were in flight.
    bench.finish_steps(2);
    let pending = embed(&handle, embedding("future", &ids(9)));
    eventually("it runs", || !bench.all_free());
    drop(pending.wait());
    eventually("its blocks are free", || bench.all_free());
    assert_eq!(handle.stats().counters.aborted, 2);
    bench.finish_steps(20);
    embed(&handle, embedding("done", &ids(9))).wait_blocking().unwrap();
    let late = embed(&handle, embedding("not waited for", &ids(9)));
    eventually("it is done", || handle.stats().counters.finished == 2);
    drop(late);
    assert_eq!(handle.abort_blocking(RequestId::new("done")).unwrap().stage, AbortStage::Finished);
    assert_eq!(handle.stats().counters.aborted, 2);
}

#[test]
fn a_deadline_ends_it_queued_or_running() {
    let bench = Bench::with(|options| options.max_num_seqs = 1);
    let handle = bench.handle();
    let soon = || Some(Instant::now() + Duration::from_millis(60));
    let running = embed(&handle, EmbedRequest { deadline: soon(), ..embedding("running", &ids(30)) });
    bench.step_started();
    let queued = embed(&handle, EmbedRequest { deadline: soon(), ..embedding("queued", &ids(3)) });
    for pending in [running, queued] {
        let error = pending.wait_blocking().unwrap_err();
        assert_eq!(error, RequestError::DeadlineExceeded { completion_tokens: 0 });
    }
    eventually("all is free", || bench.all_free());
}

#[test]
fn the_queue_is_bounded_and_ids_are_unique_for_both_kinds_together() {
    let bench = Bench::with(|options| options.max_num_seqs = 1);
    let handle = bench.handle();
    let running = embed(&handle, embedding("a", &ids(30)));
    bench.step_started();
    let same = embed(&handle, embedding("a", &ids(2))).wait_blocking();
    assert_eq!(same, Err(RequestError::DuplicateId("a".into())));
    let error = collect(submit(&handle, request("a", &[1], 2))).unwrap_err();
    assert_eq!(error.code(), ErrorCode::AlreadyExists);
    let mut waiting = Vec::new();
    eventually("the refused gave their places back", || handle.stats().counters.refused == 2);
    let refusal = loop {
        let next = embedding(&format!("w{}", waiting.len()), &ids(2));
        match handle.submit_embed(handle.validate_embed(next).unwrap()) {
            Ok(pending) => waiting.push(pending),
            Err(error) => break error,
        }
    };
    assert_eq!((refusal.code(), waiting.len()), (ErrorCode::ResourceExhausted, 3));
    drop(running);
}

#[test]
fn a_drain_refuses_new_ones_and_waits_for_those_that_run() {
    let bench = Bench::new();
    let handle = bench.handle();
    let pending = embed(&handle, embedding("runs", &ids(9)));
    bench.step_started();
    let draining = thread::spawn({
        let handle = handle.clone();
        move || block_on(handle.drain(Duration::from_secs(10))).unwrap()
    });
    eventually("it drains", || handle.stats().draining);
    let late = handle.validate_embed(embedding("late", &ids(3))).unwrap();
    assert_eq!(handle.submit_embed(late).unwrap_err(), RequestError::Draining);
    bench.finish_steps(5);
    assert_eq!(pending.wait_blocking().unwrap().values, mean(9));
    assert_eq!(draining.join().unwrap().finished, 1);
}

#[test]
fn what_goes_wrong_with_one_harms_no_other() {
    let bench = Bench::new();
    let handle = bench.handle();
    bench.finish_steps(50);
    let healthy = embed(&handle, embedding("healthy", &ids(20)));
    let error = embed(&handle, embedding("nan", &[1, NAN.0, 2])).wait_blocking().unwrap_err();
    assert_eq!(error, RequestError::NotFinite { position: 3 });
    let error = embed(&handle, embedding("poison", &[1, POISON.0])).wait_blocking().unwrap_err();
    assert_eq!(error.code(), ErrorCode::Internal);
    assert_eq!(healthy.wait_blocking().unwrap().values, mean(20));
    assert!(bench.all_free());
    let error = embed(&handle, embedding("loss", &[LOSS.0])).wait_blocking().unwrap_err();
    assert_eq!(error.code(), ErrorCode::DeviceLost);
    let late = handle.validate_embed(embedding("late", &ids(3))).unwrap();
    assert_eq!(handle.submit_embed(late).unwrap_err().code(), ErrorCode::DeviceLost);
}

#[test]
fn cached_prefixes_are_used_where_their_states_are_not_needed_and_by_nobody_else() {
    let bench = pooled(Pooling::Last);
    let handle = bench.handle();
    bench.finish_steps(200);
    let cached = |credential: &str, salt: &str| {
        let request = EmbedRequest {
            credential: credential.into(),
            cache_salt: salt.into(),
            ..embedding("", &ids(13))
        };
        let answer = embed(&handle, request).wait_blocking().unwrap();
        assert_eq!(answer.values, state(12));
        answer.cached_tokens
    };
    assert_eq!([cached("a", ""), cached("a", "")], [0, 12]);
    assert_eq!([cached("b", ""), cached("a", "salt"), cached("a", "salt")], [0, 0, 12]);
    // What one kind has read serves the other: keys and values are the same.
    let mut generation = request("g", &ids(13), 1);
    generation.credential = "a".into();
    let (_, last) = collect(submit(&handle, generation)).unwrap();
    assert_eq!(last.finish.unwrap().usage.cached_tokens, 12);
    let counters = handle.stats().counters;
    assert_eq!((counters.prefix_cache_queries, counters.prefix_cache_hits), (6 * 13, 3 * 12));
    for pooling in [Pooling::Mean, Pooling::Cls] {
        let bench = pooled(pooling);
        let handle = bench.handle();
        bench.finish_steps(20);
        for _ in 0..2 {
            let answer = embed(&handle, embedding("", &ids(13))).wait_blocking().unwrap();
            assert_eq!(answer.cached_tokens, 0, "{pooling:?} needs the state of the first token");
        }
        assert_eq!(handle.stats().counters.prefix_cache_queries, 0, "{pooling:?} does not look");
    }
}

#[test]
fn what_is_wrong_is_refused_at_the_door_with_its_field() {
    let bench = Bench::new();
    let handle = bench.handle();
    let field = |request: EmbedRequest| match handle.validate_embed(request) {
        Err(RequestError::Invalid(violations)) => violations.iter().map(|v| v.field).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let plain = || embedding("e", &ids(3));
    assert_eq!(field(EmbedRequest { dimensions: Some(0), ..plain() }), ["dimensions"]);
    assert_eq!(field(EmbedRequest { dimensions: Some(WIDTH as u32 + 1), ..plain() }), ["dimensions"]);
    assert_eq!(field(EmbedRequest { priority: 1, ..plain() }), ["priority"]);
    assert_eq!(field(EmbedRequest { cache_salt: "s".repeat(257), ..plain() }), ["cache_salt"]);
    let two = EmbedRequest { dimensions: Some(0), id: Some(RequestId::new("\n")), ..plain() };
    assert_eq!(field(two), ["request_id", "dimensions"]);
    assert_eq!(field(embedding("e", &[])), ["prompt.token_ids"]);
    assert_eq!(field(embedding("e", &[1 << 30])), ["prompt.token_ids"]);
    assert_eq!(field(EmbedRequest::new(Prompt::Text("a word ".repeat(500)))), ["prompt.text"]);
    let other = EmbedRequest { model: Some("other".into()), ..plain() };
    assert_eq!(handle.validate_embed(other).unwrap_err().code(), ErrorCode::NotFound);
    // Nothing follows a prompt that is embedded, so it may fill the context and the cache.
    let full = (BLOCKS * BLOCK_SIZE) as u32;
    assert_eq!(field(embedding("e", &vec![5; full as usize + 1])), ["prompt.token_ids"]);
    bench.finish_steps(20);
    let pending = embed(&handle, embedding("e", &vec![5; full as usize]));
    assert_eq!(pending.wait_blocking().unwrap().values, mean(full as usize));
}
