//! From the engine's terms to the wire's and back: nothing may be lost on the way. Whatever is made here has every field named, so that a new
//! one is made, and sent, too.

use std::{collections::VecDeque, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Map, Value, json};
use tidemill_engine::{
    Counters, EngineStats, Histogram, Histograms, RequestError, Violation,
    activity::{AbortCause, ActiveRow, Activity, BlockMap, PastAbort, Waiter},
    ids::{RequestId, TenantId, TokenId},
    kv::BlockCounts,
    output::{AbortReceipt, AbortStage, Finish, FinishReason, MatchedStop, Output, TokenLogprobs, Usage},
    request::{EmbedRequest, GenerateRequest, Prompt, ScoreInput, ScoreRequest},
    sampling::SamplingParams,
    scheduler::Stage,
    structured::{Structured, Thinking},
    text::chat::{ChatMessage, ChatPrompt},
};

use super::{
    abort_receipt, activity, call_error, embed_message, engine_stats, generate_message, output, score_message,
};
use crate::{
    client::CallError,
    convert::{self, ResponseWriter, WriteOutput},
};

/// Makes values of which no two are likely to be equal.
struct Maker(StdRng);

impl Maker {
    fn count(&mut self) -> usize {
        self.0.random_range(0..1 << 30)
    }

    fn id(&mut self) -> TokenId {
        TokenId(self.0.random())
    }

    fn text(&mut self) -> String {
        let length = self.0.random_range(1..12);
        (0..length).map(|_| *['a', '\n', '"', 'é', '🦊', '\0'].choose(&mut self.0).unwrap()).collect()
    }

    fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.0.random_bool(0.7).then(|| make(self))
    }

    fn some<T>(&mut self, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let length = self.0.random_range(0..4);
        (0..length).map(|_| make(self)).collect()
    }

    fn time(&mut self) -> Duration {
        Duration::from_nanos(self.0.random_range(0..1_000_000_000_000_000))
    }

    fn float(&mut self) -> f32 {
        self.0.random_range(-50.0..50.0)
    }

    fn json(&mut self) -> Value {
        json!([{ "type": "function", "n": self.count(), "x": [null, true, self.text()] }])
    }

    fn chat(&mut self) -> ChatPrompt {
        let turn = |make: &mut Self| ChatMessage {
            role: make.text(),
            content: make.text(),
            tool_calls: make.maybe(Self::json),
            tool_call_id: make.maybe(Self::text),
            name: make.maybe(Self::text),
            reasoning_content: make.maybe(Self::text),
        };
        let more = |make: &mut Self| Map::from_iter([(make.text(), make.json())]);
        ChatPrompt {
            messages: self.some(turn),
            tools: self.maybe(Self::json),
            add_generation_prompt: self.0.random(),
            continue_final_message: self.0.random(),
            template_kwargs: self.maybe(more).unwrap_or_default(),
        }
    }

    fn prompt(&mut self) -> Prompt {
        match self.0.random_range(0..3) {
            0 => Prompt::Text(self.text()),
            1 => Prompt::TokenIds(self.some(Self::id)),
            _ => Prompt::Chat(self.chat()),
        }
    }

    fn structured(&mut self) -> Structured {
        match self.0.random_range(0..5) {
            0 => Structured::JsonObject,
            1 => Structured::JsonSchema(self.text().into()),
            2 => Structured::Regex(self.text().into()),
            3 => Structured::Choice(self.some(Self::text).into()),
            _ => Structured::Lark(self.text().into()),
        }
    }

    fn sampling(&mut self) -> SamplingParams {
        let mut logit_bias = self.some(|make| (make.id(), make.float()));
        // As front ends make them: the wire's map has neither order nor doubles.
        logit_bias.sort_unstable_by_key(|&(id, _)| id);
        logit_bias.dedup_by_key(|&mut (id, _)| id);
        SamplingParams {
            temperature: self.maybe(Self::float),
            top_k: self.maybe(|make| make.0.random()),
            top_p: self.maybe(Self::float),
            min_p: self.maybe(Self::float),
            repetition_penalty: self.maybe(Self::float),
            presence_penalty: self.maybe(Self::float),
            frequency_penalty: self.maybe(Self::float),
            logit_bias,
            seed: self.maybe(|make| make.0.random()),
            max_tokens: self.maybe(|make| make.0.random()),
            min_tokens: self.maybe(|make| make.0.random()),
            stop: self.some(Self::text),
            stop_token_ids: self.some(Self::id),
            ignore_eos: self.0.random(),
            logprobs: self.maybe(|make| make.0.random()),
            prompt_logprobs: self.maybe(|make| make.0.random()),
            n: self.maybe(|make| make.0.random()),
        }
    }

    fn request(&mut self) -> GenerateRequest {
        GenerateRequest {
            id: Some(RequestId::new(self.text())),
            prompt: self.prompt(),
            sampling: self.sampling(),
            structured: self.maybe(Self::structured),
            thinking: self.maybe(|make| Thinking {
                start: make.text(),
                end: make.text(),
                budget: make.maybe(|make| make.0.random()),
            }),
            token_ids_only: self.0.random(),
            include_special_tokens: self.0.random(),
            model: self.maybe(Self::text),
            // Headers carry these two.
            deadline: None,
            trace_parent: None,
            priority: self.0.random(),
            tenant: TenantId::new(self.text()),
            credential: self.text().into(),
            cache_salt: self.text(),
        }
    }

    fn embedding(&mut self) -> EmbedRequest {
        let ids = self.some(Self::id);
        EmbedRequest {
            id: Some(RequestId::new(self.text())),
            prompt: if self.0.random() { Prompt::Text(self.text()) } else { Prompt::TokenIds(ids) },
            model: self.maybe(Self::text),
            deadline: None,
            priority: self.0.random(),
            tenant: TenantId::new(self.text()),
            credential: self.text().into(),
            cache_salt: self.text(),
            trace_parent: None,
            dimensions: self.maybe(|make| make.0.random()),
            normalize: self.maybe(|make| make.0.random()),
            prompt_name: self.maybe(Self::text),
            truncate_prompt_tokens: self.maybe(|make| make.0.random()),
        }
    }

    fn score(&mut self) -> ScoreRequest {
        let pair = ScoreInput::Pair { query: self.text(), document: self.text() };
        let ids =
            ScoreInput::TokenIds { ids: self.some(Self::id), segments: self.some(|make| make.0.random()) };
        ScoreRequest {
            id: Some(RequestId::new(self.text())),
            input: if self.0.random() { pair } else { ids },
            instruction: self.maybe(Self::text),
            model: self.maybe(Self::text),
            deadline: None,
            priority: self.0.random(),
            tenant: TenantId::new(self.text()),
            credential: self.text().into(),
            cache_salt: self.text(),
            trace_parent: None,
            truncate_prompt_tokens: self.maybe(|make| make.0.random()),
            use_activation: self.maybe(|make| make.0.random()),
        }
    }

    fn logprobs(&mut self) -> TokenLogprobs {
        TokenLogprobs {
            token: self.id(),
            logprob: self.float(),
            rank: self.0.random(),
            top: self.some(|make| (make.id(), make.float())),
        }
    }

    fn finish(&mut self) -> Finish {
        let reasons = [FinishReason::Stop, FinishReason::Length, FinishReason::Abort];
        Finish {
            reason: *reasons.choose(&mut self.0).unwrap(),
            matched_stop: match self.0.random_range(0..3) {
                0 => None,
                1 => Some(MatchedStop::Text(self.text())),
                _ => Some(MatchedStop::Token(self.id())),
            },
            usage: Usage {
                prompt_tokens: self.count(),
                cached_tokens: self.count(),
                completion_tokens: self.count(),
                queue_time: self.time(),
                time_to_first_token: self.time(),
                num_preemptions: self.count(),
            },
        }
    }

    fn output(&mut self) -> Output {
        Output {
            index: self.0.random_range(0..8),
            text: self.text(),
            token_ids: self.some(Self::id),
            logprobs: self.some(Self::logprobs),
            prompt_logprobs: Vec::new(),
            finish: self.maybe(Self::finish),
        }
    }

    fn receipt(&mut self) -> AbortReceipt {
        use AbortStage::{Decode, Finished, Prefill, Queued, Unknown};
        AbortReceipt {
            id: RequestId::new(self.text()),
            stage: *[Unknown, Queued, Prefill, Decode, Finished].choose(&mut self.0).unwrap(),
            completion_tokens: self.count(),
            blocks_freed: self.count(),
            rows_freed: self.count(),
            time_to_free: self.time(),
        }
    }

    fn histogram(&mut self) -> Histogram {
        let bounds: Vec<f64> = self.some(|make| make.0.random());
        let counts = (0..=bounds.len()).map(|_| self.0.random()).collect();
        Histogram { bounds: bounds.into(), counts, sum: self.0.random() }
    }

    fn stats(&mut self) -> EngineStats {
        EngineStats {
            num_requests_running: self.count(),
            num_requests_waiting: self.count(),
            num_requests_parked: self.count(),
            kv_blocks: BlockCounts {
                total: self.count(),
                free: self.count(),
                owned: self.count(),
                cached: self.count(),
            },
            num_host_blocks_used: self.count(),
            counters: self.counters(),
            histograms: Histograms {
                time_to_first_token: self.histogram(),
                inter_token_latency: self.histogram(),
                e2e_request_latency: self.histogram(),
                request_queue_time: self.histogram(),
                request_prefill_time: self.histogram(),
                request_decode_time: self.histogram(),
                iteration_tokens: self.histogram(),
                abort_to_free: self.histogram(),
                step_plan: self.histogram(),
                step_execute: self.histogram(),
                step_resolve: self.histogram(),
            },
            heartbeat_age: self.time(),
            uptime: self.time(),
            draining: self.0.random(),
        }
    }

    fn counters(&mut self) -> Counters {
        Counters {
            prompt_tokens: self.0.random(),
            generation_tokens: self.0.random(),
            steps: self.0.random(),
            preemptions: self.0.random(),
            finished: self.0.random(),
            finished_by_length: self.0.random(),
            aborted: self.0.random(),
            refused: self.0.random(),
            failed: self.0.random(),
            prefix_cache_queries: self.0.random(),
            prefix_cache_hits: self.0.random(),
            blocks_saved: self.0.random(),
            blocks_loaded: self.0.random(),
            parked: self.0.random(),
            lives_lost: self.0.random(),
        }
    }

    fn activity(&mut self) -> Activity {
        let row = |make: &mut Self| ActiveRow {
            id: RequestId::new(make.text()),
            index: make.0.random(),
            stage: *[Stage::Queued, Stage::Prefill, Stage::Decode].choose(&mut make.0).unwrap(),
            prompt_tokens: make.count(),
            computed_tokens: make.count(),
            completion_tokens: make.count(),
            kv_blocks: make.count(),
        };
        let waiter = |make: &mut Self| Waiter {
            id: RequestId::new(make.text()),
            index: make.0.random(),
            prompt_tokens: make.count(),
            completion_tokens: make.count(),
            is_resumed: make.0.random(),
        };
        let abort = |make: &mut Self| PastAbort {
            number: make.0.random(),
            at: make.time(),
            cause: *[AbortCause::Called, AbortCause::Dropped].choose(&mut make.0).unwrap(),
            receipt: make.receipt(),
        };
        Activity {
            steps: self.0.random(),
            uptime: self.time(),
            max_num_seqs: self.count(),
            rows: self.some(row),
            rows_left_out: self.count(),
            num_waiting: self.count(),
            waiting: self.some(waiter),
            blocks: BlockMap {
                total: self.count(),
                blocks_per_cell: self.count(),
                cells: self.some(|make| make.0.random()),
            },
            aborts: self.some(abort),
        }
    }
}

/// Tries so many values; the seed of one that is lost is shown.
fn each(check: impl Fn(&mut Maker)) {
    for seed in 0..500 {
        let shown = Shown(seed);
        check(&mut Maker(StdRng::seed_from_u64(seed)));
        std::mem::forget(shown);
    }
}

struct Shown(u64);

impl Drop for Shown {
    fn drop(&mut self) {
        eprintln!("with the seed {}", self.0);
    }
}

#[test]
fn a_request_arrives_whole() {
    each(|make| {
        let request = make.request();
        let mut message = generate_message(request.clone());
        let id = RequestId::new(std::mem::take(&mut message.request_id));
        assert_eq!(convert::generate_request(id, message).unwrap(), request);
    });
}

#[test]
fn requests_for_embeddings_and_scores_arrive_whole() {
    each(|make| {
        let (embedding, score) = (make.embedding(), make.score());
        let mut message = embed_message(embedding.clone()).unwrap();
        let id = RequestId::new(std::mem::take(&mut message.request_id));
        assert_eq!(convert::embed_request(id, message).unwrap(), embedding);
        let mut message = score_message(score.clone());
        let id = RequestId::new(std::mem::take(&mut message.request_id));
        assert_eq!(convert::score_request(id, message).unwrap(), score);
    });
}

#[test]
fn an_output_arrives_whole() {
    each(|make| {
        let mut outputs: Vec<Output> = (0..3).map(|_| make.output()).collect();
        outputs[0].index = 0;
        outputs[0].prompt_logprobs = make.some(Maker::logprobs);
        let (mut writer, mut messages) = (ResponseWriter::new(RequestId::new("r"), true), VecDeque::new());
        outputs.iter().for_each(|output| writer.write(output.clone(), &mut messages));
        let arrived: Vec<Output> = messages.into_iter().map(|message| output(message, 8).unwrap()).collect();
        assert_eq!(arrived, outputs);
    });
}

#[test]
fn receipts_statistics_and_activity_arrive_whole() {
    each(|make| {
        let receipt = make.receipt();
        assert_eq!(abort_receipt(convert::abort_response(&receipt)), Ok(receipt));
        let stats = make.stats();
        assert_eq!(engine_stats(convert::stats(&stats)), Ok(stats));
        let reading = make.activity();
        assert_eq!(activity(convert::activity(&reading)), Ok(reading));
    });
}

#[test]
fn an_error_is_the_same_as_in_the_engines_own_process() {
    let text = || "a reason".to_owned();
    let (wait, limit, retry_after) =
        (Duration::from_secs(3), Duration::from_secs(2), Duration::from_millis(700));
    let violation = |field, message: &str| Violation { field, message: message.to_owned() };
    let errors = [
        RequestError::Invalid(vec![
            violation("sampling.temperature", "-1 is not in [0, 100]"),
            violation("tenant", "longer than 256 bytes"),
        ]),
        RequestError::Invalid(vec![violation("sampling.stop", "holds an empty string"); 30]),
        RequestError::Unsupported(text()),
        RequestError::ModelNotFound { asked: "a".into(), served: "b".into() },
        RequestError::DuplicateId("a".into()),
        RequestError::QueueFull { waiting: 9, retry_after },
        RequestError::Overloaded { wait, limit, retry_after },
        RequestError::SlowReader { unread: wait },
        RequestError::Draining,
        RequestError::EngineStopped(text()),
        RequestError::DeviceLost(text()),
        RequestError::DeadlineExceeded { completion_tokens: 7 },
        RequestError::Aborted,
        RequestError::NotFinite { position: 7 },
        RequestError::Internal(text()),
    ];
    for error in errors {
        let status = convert::status(&error, &RequestId::new("r"));
        assert_eq!(call_error(&status), CallError::from(error));
    }
}

#[test]
fn what_no_engine_sends_is_an_error_and_no_panic() {
    let mut make = Maker(StdRng::seed_from_u64(0));
    let mut writer = ResponseWriter::new(RequestId::new("r"), false);
    let mut messages = VecDeque::new();
    writer.write(Output { index: 2, finish: Some(make.finish()), ..make.output() }, &mut messages);
    let message = messages.pop_front().unwrap();
    assert!(output(message.clone(), 3).is_ok());
    assert!(output(message.clone(), 2).is_err(), "a completion that nobody asked for");
    for seconds in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
        let mut message = message.clone();
        message.usage.as_mut().unwrap().queue_seconds = seconds;
        assert!(output(message, 3).is_err(), "{seconds} seconds");
    }
    let mut stats = convert::stats(&make.stats());
    stats.step_plan_seconds.as_mut().unwrap().counts.pop();
    assert!(engine_stats(stats).is_err());
}
