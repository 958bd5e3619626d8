//! Embeddings and scores.

use tidemill_engine::{
    ErrorCode, PairFormat,
    request::{EmbedRequest, GenerateRequest, Prompt, ScoreInput, ScoreRequest},
};

use crate::rig::{MODELS, TOLERANCE, difference, engine, fixture, goldens, result, start};

#[test]
fn embeddings_and_scores_equal_transformers() {
    for name in MODELS {
        let engine = engine(name);
        let handle = engine.handle();
        for (i, golden) in goldens(name).iter().enumerate() {
            let off = difference(&result(&handle, golden), &golden.expected);
            assert!(off <= TOLERANCE, "{name}, prompt {i}: off by {off}");
        }
    }
}

#[test]
fn segments_are_seen() {
    let engine = engine("bert_cross");
    for golden in &mut goldens("bert_cross") {
        let with = result(&engine.handle(), golden);
        golden.segments.clear();
        assert!(difference(&with, &result(&engine.handle(), golden)) > 1e-3);
    }
}

#[test]
fn a_score_is_the_logistic_function_of_its_value_unless_the_folder_says_otherwise() {
    for (name, is_logistic) in [("bert_cross", false), ("xlmr_rerank", true), ("qwen3_rerank", true)] {
        let engine = engine(name);
        let golden = &goldens(name)[1];
        let input = ScoreInput::TokenIds { ids: golden.ids.clone(), segments: golden.segments.clone() };
        let request = ScoreRequest::new(input);
        let handle = engine.handle();
        let score = handle.submit_score(handle.validate_score(request).unwrap()).unwrap();
        let (score, value) = (score.wait_blocking().unwrap().value, golden.expected[0]);
        let expected = if is_logistic { 1.0 / (1.0 + (-value).exp()) } else { value };
        assert!((score - expected).abs() <= TOLERANCE, "{name}: {score} is not {expected}");
    }
}

#[test]
fn models_say_what_they_can_do_and_refuse_the_rest() {
    for (name, format, only) in [
        ("bert_minilm", None, true),
        ("bert_cross", Some(PairFormat::Pair), true),
        ("modernbert_rerank", Some(PairFormat::Pair), true),
        ("qwen3_embed", None, true),
        ("qwen3_rerank", Some(PairFormat::YesNo), false),
    ] {
        let engine = engine(name);
        let (handle, prompt) = (engine.handle(), || Prompt::TokenIds(goldens(name)[0].ids.clone()));
        assert_eq!(handle.info().scoring.map(|scoring| scoring.format), format, "{name}");
        let refused = |code: Option<ErrorCode>| code == Some(ErrorCode::FailedPrecondition);
        let generates = handle.validate(GenerateRequest::new(prompt())).err();
        assert_eq!(refused(generates.as_ref().map(|error| error.code())), only, "{name}: {generates:?}");
        let embeds = handle.validate_embed(EmbedRequest::new(prompt())).err();
        let scores_only = only && format.is_some();
        assert_eq!(refused(embeds.as_ref().map(|error| error.code())), scores_only, "{name}: {embeds:?}");
        let input = ScoreInput::TokenIds { ids: goldens(name)[0].ids.clone(), segments: Vec::new() };
        let scores = handle.validate_score(ScoreRequest::new(input)).err();
        let said = scores.as_ref().map(ToString::to_string).unwrap_or_default();
        assert_eq!(refused(scores.as_ref().map(|error| error.code())), format.is_none(), "{name}: {said}");
        assert!(format.is_some() || said.contains("/v1/embeddings"), "{name}: {said}");
    }
}

#[test]
fn a_step_must_hold_the_longest_prompt_of_an_encoder() {
    let error = start(&fixture("bert_minilm"), 64).unwrap_err().to_string();
    assert!(error.contains("--max-num-batched-tokens") && error.contains("80"), "{error}");
    assert!(start(&fixture("qwen3_embed"), 64).is_ok(), "a decoder reads prompts in parts");
}
