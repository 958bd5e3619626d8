//! Answers of a given form over the wire.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Harness, text};
use serde_json::{Value, json};
use tidemill_proto::v1::{
    FinishReason, GenerateRequest, SamplingParams, Structured, Thinking,
    structured::{AnyJsonObject, Choice, Form},
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

fn asked(form: Form, sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest { structured: Some(Structured { form: Some(form) }), ..text("The sea is", sampling) }
}

fn drawn(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: Some(2.0),
        seed: Some(seed),
        max_tokens: Some(120),
        ..SamplingParams::default()
    }
}

fn choice(texts: &[&str]) -> Form {
    Form::Choice(Choice { texts: texts.iter().map(|text| (*text).to_owned()).collect() })
}

#[tokio::test]
async fn every_form_is_kept() {
    let mut harness = Harness::start().await;
    let schema = json!({
        "type": "object",
        "properties": { "wave": { "enum": ["high", "low"] }, "count": { "type": "integer" } },
        "required": ["wave", "count"],
        "additionalProperties": false
    });
    let is_of_schema = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap();
        ["high", "low"].map(Value::from).contains(&value["wave"]) && value["count"].is_number()
    };
    for seed in 0..5 {
        let request = asked(Form::JsonSchema(schema.to_string()), drawn(seed));
        let answer = harness.complete(request).await;
        assert!(answer.finish != FinishReason::Stop || is_of_schema(&answer.text), "{}", answer.text);
        let answer = harness.complete(asked(Form::Regex("[a-c]{2,5}!".into()), drawn(seed))).await;
        let word = answer.text.strip_suffix('!').unwrap();
        assert!((2..=5).contains(&word.len()) && word.bytes().all(|byte| b"abc".contains(&byte)));
        let answer = harness.complete(asked(choice(&["yes", "nein", "👍"]), drawn(seed))).await;
        assert!(["yes", "nein", "👍"].contains(&answer.text.as_str()), "{}", answer.text);
        let answer =
            harness.complete(asked(Form::Lark("start: \"a\" \"b\"+ \"c\"".into()), drawn(seed))).await;
        let bs = answer.text.strip_prefix('a').unwrap();
        assert!(bs.trim_end_matches('c').bytes().all(|byte| byte == b'b'), "{}", answer.text);
    }
    let answer = harness.complete(asked(Form::JsonObject(AnyJsonObject {}), drawn(1))).await;
    assert!(answer.text.starts_with('{'), "{}", answer.text);
    harness.at_rest().await;
}

#[tokio::test]
async fn thoughts_are_cut_off_and_the_form_follows() {
    let mut harness = Harness::start().await;
    let thinking = Thinking { start: "<think>".into(), end: "</think>".into(), budget: Some(5) };
    let request =
        GenerateRequest { thinking: Some(thinking), ..text("Is the sea deep? <think>\n", drawn(3)) };
    let structured = Some(Structured { form: Some(choice(&["yes", "no"])) });
    let answer = harness.complete(GenerateRequest { structured, ..request }).await;
    let (_, rest) = answer.text.split_once("</think>").unwrap();
    assert!(["yes", "no"].contains(&rest) && answer.finish == FinishReason::Stop, "{}", answer.text);
}

#[tokio::test]
async fn what_is_no_form_is_refused_by_name_and_nobody_else_notices() {
    let mut harness = Harness::start().await;
    let plain = SamplingParams::default;
    let endless = SamplingParams { ignore_eos: true, ..plain() };
    let empty = GenerateRequest { structured: Some(Structured { form: None }), ..text("Once", plain()) };
    let marks = Thinking { start: String::new(), end: "</think>".into(), budget: None };
    let refused = [
        ("structured", empty),
        ("structured", asked(choice(&[]), plain())),
        ("structured", asked(Form::Regex("(".into()), plain())),
        ("structured", asked(Form::Lark("start: nothing".into()), plain())),
        ("structured", asked(Form::JsonSchema("{\"type\":".into()), plain())),
        (
            "structured",
            asked(Form::JsonSchema(json!({ "type": "array", "contains": {} }).to_string()), plain()),
        ),
        ("structured", asked(Form::JsonSchema("[".repeat(1 << 20)), plain())),
        ("sampling.ignore_eos", asked(Form::JsonObject(AnyJsonObject {}), endless)),
        ("thinking", GenerateRequest { thinking: Some(marks), ..text("Once", plain()) }),
    ];
    let canary = || asked(choice(&["alive"]), plain());
    for (field, request) in refused {
        let status: Status = harness.generate(request).await.map(|_| field).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert!(violations.iter().any(|v| v.field == field && !v.description.is_empty()), "{status:?}");
        assert_eq!(harness.complete(canary()).await.text, "alive");
    }
    harness.at_rest().await;
}
