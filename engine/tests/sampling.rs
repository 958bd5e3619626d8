//! Sampling parameters through the whole engine, on the built-in model.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, LazyLock};

use tidemill_engine::{
    Engine, EngineConfig, RequestError,
    ids::TokenId,
    model::{Checkpoint, Decoder, DecoderLimits, ModelFiles, ModelSource, ModelSpec},
    output::{FinishReason, MatchedStop, Output, TokenLogprobs},
    request::{GenerateRequest, Prompt},
    sampling::SamplingParams,
    text::chat::{ChatMessage, ChatPrompt},
};
use tidemill_kernels::{
    DType,
    cpu::{Compute, CpuConfig, CpuOps},
    ops::BatchMeta,
};

/// One engine for all tests; chunks are small, so prompts take several steps.
static ENGINE: LazyLock<Engine> = LazyLock::new(|| {
    let config = EngineConfig { max_num_batched_tokens: Some(16), ..EngineConfig::new(ModelSource::Builtin) };
    Engine::start(config, |_| ()).unwrap()
});

fn chat(text: &str) -> Prompt {
    let message = ChatMessage::new("user", text);
    Prompt::Chat(ChatPrompt::new(vec![message]))
}

fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: Some(0.0), max_tokens: Some(max_tokens), ..SamplingParams::default() }
}

/// All outputs of a request, merged per completion.
fn generate(prompt: Prompt, sampling: SamplingParams) -> Result<Vec<Output>, RequestError> {
    let handle = ENGINE.handle();
    let n = sampling.n.unwrap_or(1) as usize;
    let request = GenerateRequest { sampling, ..GenerateRequest::new(prompt) };
    let mut generation = handle.submit(handle.validate(request)?)?;
    let mut merged: Vec<Option<Output>> = vec![None; n];
    while let Some(output) = generation.next_blocking() {
        let output = output?;
        match &mut merged[output.index as usize] {
            Some(all) => {
                assert!(all.finish.is_none(), "nothing follows a completion's end");
                all.text += &output.text;
                all.token_ids.extend(output.token_ids);
                all.logprobs.extend(output.logprobs);
                all.prompt_logprobs.extend(output.prompt_logprobs);
                all.finish = output.finish;
            }
            empty => *empty = Some(output),
        }
    }
    Ok(merged.into_iter().map(|output| output.expect("every completion gives something")).collect())
}

fn one(prompt: Prompt, sampling: SamplingParams) -> Output {
    generate(prompt, sampling).unwrap().remove(0)
}

fn reason(output: &Output) -> FinishReason {
    output.finish.as_ref().unwrap().reason
}

#[test]
fn greedy_ends_with_the_models_own_end_and_says_something() {
    let output = one(chat("What is a KV cache?"), greedy(100));
    assert_eq!(reason(&output), FinishReason::Stop);
    assert!(output.text.len() > 20 && !output.text.contains("<|im_end|>"), "{:?}", output.text);
    assert_eq!(output.finish.unwrap().usage.completion_tokens, output.token_ids.len());
}

#[test]
fn the_same_seed_gives_the_same_tokens_and_another_seed_others() {
    let sample = |seed| {
        let sampling =
            SamplingParams { temperature: Some(1.5), seed: Some(seed), ignore_eos: true, ..greedy(24) };
        one(chat("Tell me a story."), sampling).token_ids
    };
    assert_eq!(sample(7), sample(7));
    assert_ne!(sample(7), sample(8));
}

#[test]
fn without_a_seed_every_request_is_drawn_anew() {
    let sample = || {
        let sampling = SamplingParams { temperature: Some(2.0), ignore_eos: true, ..greedy(24) };
        one(chat("Tell me a story."), sampling).token_ids
    };
    assert_ne!(sample(), sample());
}

#[test]
fn n_completions_differ_and_the_first_is_the_request_alone() {
    let sampling = SamplingParams { temperature: Some(1.5), seed: Some(3), ignore_eos: true, ..greedy(16) };
    let alone = one(chat("Tell me a story."), sampling.clone());
    let all = generate(chat("Tell me a story."), SamplingParams { n: Some(3), ..sampling }).unwrap();
    assert_eq!(all[0].token_ids, alone.token_ids);
    assert!(all[0].token_ids != all[1].token_ids && all[1].token_ids != all[2].token_ids);
}

#[test]
fn logit_bias_forces_and_forbids() {
    let favourite = TokenId(100);
    let forced = SamplingParams { logit_bias: vec![(favourite, 100.0)], ..greedy(5) };
    assert_eq!(one(chat("Hello"), forced).token_ids, [favourite; 5]);
    let first = one(chat("Hello"), greedy(1)).token_ids[0];
    let forbidden = SamplingParams { logit_bias: vec![(first, -100.0)], ..greedy(1) };
    assert_ne!(one(chat("Hello"), forbidden).token_ids[0], first);
}

#[test]
fn penalties_stop_repetition() {
    let bias = vec![(TokenId(100), 50.0), (TokenId(101), 49.0)];
    let repeats = SamplingParams { logit_bias: bias.clone(), ..greedy(4) };
    assert_eq!(one(chat("Hello"), repeats).token_ids, [TokenId(100); 4]);
    let presence = SamplingParams { presence_penalty: Some(2.0), logit_bias: bias.clone(), ..greedy(4) };
    assert_eq!(one(chat("Hello"), presence).token_ids[..2], [TokenId(100), TokenId(101)]);
    let repetition = SamplingParams { repetition_penalty: Some(2.0), logit_bias: bias, ..greedy(2) };
    assert_eq!(one(chat("Hello"), repetition).token_ids, [TokenId(100), TokenId(101)]);
}

#[test]
fn min_tokens_holds_back_the_end_and_ignore_eos_goes_past_it() {
    let short = one(chat("What is a KV cache?"), greedy(200));
    let length = short.token_ids.len();
    let longer = SamplingParams { min_tokens: Some(length as u32 + 5), ..greedy(200) };
    assert!(one(chat("What is a KV cache?"), longer).token_ids.len() > length);
    let on = one(chat("What is a KV cache?"), SamplingParams { ignore_eos: true, ..greedy(200) });
    assert_eq!((on.token_ids.len(), reason(&on)), (200, FinishReason::Length));
}

#[test]
fn stop_tokens_are_reported_but_not_part_of_the_text() {
    let whole = one(chat("What is a KV cache?"), greedy(200));
    let stop = whole.token_ids[4];
    let first = whole.token_ids.iter().position(|&token| token == stop).unwrap();
    let output =
        one(chat("What is a KV cache?"), SamplingParams { stop_token_ids: vec![stop], ..greedy(200) });
    assert_eq!(output.token_ids, whole.token_ids[..=first]);
    assert_eq!(output.finish.unwrap().matched_stop, Some(MatchedStop::Token(stop)));
    let text = ENGINE.handle().text().decode(&whole.token_ids[..first], false).unwrap();
    assert_eq!(output.text, text);
}

#[test]
fn stop_strings_cut_the_text_wherever_tokens_end() {
    let whole = one(chat("What is a KV cache?"), greedy(200)).text;
    for start in (0..whole.len() - 6).step_by(3).filter(|&i| whole.is_char_boundary(i)) {
        let stop: String = whole[start..].chars().take(4).collect();
        let output =
            one(chat("What is a KV cache?"), SamplingParams { stop: vec![stop.clone()], ..greedy(200) });
        assert_eq!(output.text, whole[..whole.find(&stop).unwrap()], "stop {stop:?}");
        assert_eq!(output.finish.unwrap().matched_stop, Some(MatchedStop::Text(stop)));
    }
}

/// Log-probabilities of each token after the first, computed from the decoder's raw logits in f64.
fn reference_logprobs(tokens: &[TokenId]) -> Vec<Vec<f64>> {
    let files = ModelFiles::open(&ModelSource::Builtin).unwrap();
    let spec = ModelSpec::load(&files).unwrap();
    let checkpoint = Checkpoint::open(&files).unwrap();
    let kv = spec.kv_shape(8, 32, DType::Bf16);
    let count = tokens.len() as u32;
    let limits = DecoderLimits { max_num_batched_tokens: 256, max_model_len: 256 };
    let ops = CpuOps::new(CpuConfig { compute: Compute::Bf16, isa: None, threads: Some(1) }).unwrap();
    let mut decoder = Decoder::load(ops, &spec, &checkpoint, limits, |_| ()).unwrap();
    decoder.allocate_kv(kv).unwrap();
    let meta = BatchMeta {
        token_ids: tokens.iter().map(|token| token.0).collect(),
        positions: (0..count).collect(),
        slot_mapping: (0..count).collect(),
        cu_seqlens_q: vec![0, count],
        context_lens: vec![count],
        block_tables: (0..8).collect(),
        max_blocks: 8,
        logits_indices: (0..count).collect(),
        state_indices: Vec::new(),
        ..BatchMeta::default()
    };
    let logits = decoder.logits(Arc::new(meta)).unwrap();
    let log_softmax = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
        row.iter().map(|&x| f64::from(x - max) - sum.ln()).collect()
    };
    logits.chunks_exact(spec.vocab_size).map(log_softmax).collect()
}

fn check_logprobs(got: &TokenLogprobs, token: TokenId, expected: &[f64]) {
    assert_eq!(got.token, token);
    let own = expected[token.0 as usize];
    assert!((f64::from(got.logprob) - own).abs() < 1e-5, "{got:?}, expected {own}");
    assert_eq!(got.rank as usize, 1 + expected.iter().filter(|&&other| other > own).count());
    let mut order: Vec<usize> = (0..expected.len()).collect();
    order.sort_by(|&a, &b| expected[b].total_cmp(&expected[a]).then(a.cmp(&b)));
    let top: Vec<usize> = got.top.iter().map(|&(token, _)| token.0 as usize).collect();
    assert_eq!(top, order[..3]);
}

#[test]
fn logprobs_of_prompt_and_output_are_those_of_the_raw_logits() {
    let text = "Tell me a short story about a fox and a lamp, and then tell me who found the lamp.";
    let sampling = SamplingParams {
        temperature: Some(1.2),
        top_k: Some(5),
        seed: Some(1),
        repetition_penalty: Some(1.3),
        logprobs: Some(3),
        prompt_logprobs: Some(3),
        ignore_eos: true,
        ..greedy(12)
    };
    let output = one(chat(text), sampling);
    let handle = ENGINE.handle();
    let Prompt::Chat(prompt) = chat(text) else { unreachable!() };
    let mut tokens = handle.text().encode(&handle.text().render_chat(&prompt).unwrap(), false).unwrap();
    let prompt_len = tokens.len();
    assert!(prompt_len > 16, "the prompt takes more than one chunk");
    tokens.extend(&output.token_ids);
    let expected = reference_logprobs(&tokens);
    assert_eq!((output.prompt_logprobs.len(), output.logprobs.len()), (prompt_len - 1, 12));
    for (i, got) in output.prompt_logprobs.iter().chain(&output.logprobs).enumerate() {
        check_logprobs(got, tokens[i + 1], &expected[i]);
    }
}

#[test]
fn defaults_of_the_model_apply_and_the_request_wins() {
    let defaults = ENGINE.handle().info().defaults.clone();
    let handle = ENGINE.handle();
    let validated = handle.validate(GenerateRequest::new(chat("Hello"))).unwrap();
    assert_eq!(validated.sampling().temperature, defaults.temperature.unwrap_or(1.0));
    assert_eq!(validated.sampling().top_p, defaults.top_p.unwrap_or(1.0));
    let sampling = SamplingParams { temperature: Some(0.25), top_p: Some(0.5), ..SamplingParams::default() };
    let request = GenerateRequest { sampling, ..GenerateRequest::new(chat("Hello")) };
    let validated = handle.validate(request).unwrap();
    assert_eq!((validated.sampling().temperature, validated.sampling().top_p), (0.25, 0.5));
}

#[test]
fn everything_that_is_wrong_is_listed_at_once() {
    let sampling = SamplingParams {
        temperature: Some(f32::NAN),
        top_p: Some(0.0),
        min_p: Some(f32::INFINITY),
        repetition_penalty: Some(-1.0),
        presence_penalty: Some(3.0),
        logit_bias: vec![(TokenId(1_000_000), 1.0)],
        stop_token_ids: vec![TokenId(u32::MAX)],
        stop: vec![String::new()],
        logprobs: Some(21),
        n: Some(9),
        ..SamplingParams::default()
    };
    let Err(RequestError::Invalid(violations)) = generate(chat("Hello"), sampling) else {
        panic!("must be refused")
    };
    let fields: Vec<&str> = violations.iter().map(|violation| violation.field).collect();
    for field in ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "logit_bias"] {
        assert!(fields.contains(&format!("sampling.{field}").as_str()), "{field} is missing in {fields:?}");
    }
    for field in ["stop_token_ids", "stop", "logprobs", "n"] {
        assert!(fields.contains(&format!("sampling.{field}").as_str()), "{field} is missing in {fields:?}");
    }
}
