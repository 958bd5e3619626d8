//! What nobody should send: refused quickly, with words, and everybody else is served.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidemill_engine::structured::Structured;

use crate::rig::{ENGINE, ask, choice, engine, refusal, regex, request, schema, submit};

/// An answer that is the same every time.
fn canary() -> String {
    ask(&ENGINE, request(&choice(&["alive"]), None)).unwrap().text
}

#[track_caller]
fn is_refused(form: Structured, words: &str) {
    let start = Instant::now();
    let (field, message) = refusal(request(&form, None));
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    println!("refused in {:?}: {message}", start.elapsed());
    assert_eq!(field, "structured");
    assert!(message.contains(words) && message.len() < 600, "{message:?} does not say {words:?}");
    assert_eq!(canary(), "alive");
}

/// Taken or refused, but not for long, and nobody else notices.
fn is_survived(form: Structured) {
    let start = Instant::now();
    let mut request = request(&form, Some(1));
    request.sampling.max_tokens = Some(8);
    match ENGINE.handle().validate(request.clone()) {
        Ok(_) => {
            println!("compiled in {:?}", start.elapsed());
            let answer = ask(&ENGINE, request);
            println!("answered after {:?}: {:?}", start.elapsed(), answer.map(|answer| answer.text));
        }
        Err(error) => println!("refused in {:?}: {error}", start.elapsed()),
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(canary(), "alive");
}

#[test]
fn what_is_no_form_at_all() {
    is_refused(choice(&[]), "nothing");
    is_refused(choice(&["a", ""]), "empty");
    is_refused(regex(""), "empty");
    is_refused(Structured::Lark(" \n".into()), "empty");
    is_refused(Structured::JsonSchema("{".into()), "not JSON");
    is_refused(Structured::JsonSchema("[]".into()), "object or a boolean");
    is_refused(Structured::JsonSchema("false".into()), "nothing is valid");
    is_refused(regex("a{3"), "");
    is_refused(regex("(?=a)b"), "");
    is_refused(regex(r"(a)\1"), "");
    is_refused(Structured::Lark("start: missing".into()), "missing");
    is_refused(Structured::Lark("rule: \"a\"".into()), "start");
}

#[test]
fn what_nothing_matches() {
    is_refused(schema(json!({ "type": "integer", "minimum": 3, "maximum": 2 })), "");
    is_refused(schema(json!({ "enum": [] })), "");
    is_refused(schema(json!({ "allOf": [{ "type": "string" }, { "type": "null" }] })), "");
    is_refused(regex("[^\\x00-\\x{10FFFF}]"), "can write");
    is_refused(Structured::Lark("start: \"\"".into()), "empty text");
}

#[test]
fn what_is_not_supported_is_named() {
    is_refused(schema(json!({ "type": "array", "contains": { "type": "null" } })), "contains");
    is_refused(schema(json!({ "$ref": "http://example.com/x.json" })), "example.com");
    is_refused(schema(json!({ "type": "nonsense" })), "nonsense");
}

#[test]
fn what_is_too_large() {
    is_refused(Structured::Regex("a".repeat(1 << 20).into()), "bytes");
    let properties: Value =
        (0..40_000).map(|at| (format!("property {at}"), json!({ "type": "string" }))).collect();
    is_refused(schema(json!({ "type": "object", "properties": properties })), "bytes");
    is_refused(Structured::Choice((0..40_000).map(|at| format!("choice {at}")).collect()), "bytes");
}

#[test]
fn what_is_deep() {
    let deep =
        |levels: usize| (0..levels).fold(json!({ "type": "null" }), |inner, _| json!({ "not": inner }));
    is_refused(Structured::JsonSchema("[".repeat(100_000).into()), "not JSON");
    is_survived(schema(deep(60)));
    let arrays =
        (0..60).fold(json!({ "type": "null" }), |inner, _| json!({ "type": "array", "items": inner }));
    is_survived(schema(arrays));
    is_refused(
        Structured::Lark(format!("start: {}\"a\"{}", "(".repeat(50_000), ")".repeat(50_000)).into()),
        "brackets",
    );
    is_survived(Structured::Lark(format!("start: {}\"a\"{}", "(".repeat(190), ")".repeat(190)).into()));
    is_survived(Structured::Lark(format!("start: \"a\"{}", "?".repeat(50_000)).into()));
    is_refused(regex(&format!("{}a{}", "(".repeat(50_000), ")".repeat(50_000))), "");
    is_survived(regex(&format!("a{}", "*".repeat(10_000))));
    let chain: String = (0..8_000).map(|at| format!("r{at}: r{}\n", at + 1)).collect();
    is_survived(Structured::Lark(format!("start: r0\n{chain}r8000: \"a\"\n").into()));
    let chain: String = (0..8_000).map(|at| format!("T{at}: T{}\n", at + 1)).collect();
    is_survived(Structured::Lark(format!("start: T0\n{chain}T8000: \"a\"\n").into()));
}

#[test]
fn references_in_a_circle_and_in_a_chain() {
    is_survived(schema(json!({ "$ref": "#" })));
    is_survived(schema(json!({ "allOf": [{ "$ref": "#" }] })));
    is_survived(schema(
        json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } } }),
    ));
    let link = |at: usize| {
        let next = json!({ "$ref": format!("#/$defs/d{}", at + 1) });
        (format!("d{at}"), json!({ "allOf": [next, { "type": "object" }] }))
    };
    let mut chain: serde_json::Map<String, Value> = (0..2_000).map(link).collect();
    chain.insert("d2000".into(), json!({ "type": "object" }));
    is_survived(schema(json!({ "$ref": "#/$defs/d0", "$defs": chain })));
}

#[test]
fn what_explodes() {
    is_survived(regex("(a*)*b"));
    is_survived(regex("(?:(?:a{0,100}){0,100}){0,100}"));
    is_survived(regex("(.*a.{40}){10}"));
    is_survived(regex(&format!(
        "({})",
        (0..2_000).map(|at| format!(".*{at}.*")).collect::<Vec<_>>().join("|")
    )));
    let both = |a: &str, b: &str| json!({ "anyOf": [{ "required": [a] }, { "required": [b] }] });
    let all: Vec<Value> = (0..24).map(|at| both(&format!("a{at}"), &format!("b{at}"))).collect();
    is_survived(schema(json!({ "type": "object", "allOf": all })));
    is_survived(schema(
        json!({ "type": "array", "items": { "type": "integer" }, "minItems": 100_000, "maxItems": 200_000 }),
    ));
    is_survived(schema(json!({ "type": "string", "minLength": 100_000, "maxLength": 4_000_000 })));
    is_survived(schema(json!({ "enum": (0..10_000).map(|at| format!("value {at}")).collect::<Vec<_>>() })));
    is_survived(Structured::Choice((0..8_000).map(|at| format!("choice {at}")).collect()));
    is_survived(Structured::Lark("start: start start | \"a\" |".into()));
    is_refused(Structured::Lark("start: \"a\" start".into()), "too complex");
}

#[test]
fn the_same_again_is_there_at_once_and_many_at_the_same_time_pay_once() {
    let names: Value =
        (0..300).map(|at| (format!("name {at}"), json!({ "type": ["string", "integer"] }))).collect();
    let form = schema(json!({ "type": "object", "properties": names }));
    let engine = engine(false);
    let time = || {
        let start = Instant::now();
        engine.handle().validate(request(&form, None)).unwrap();
        start.elapsed()
    };
    let first = time();
    let second = (0..5).map(|_| time()).min().unwrap();
    assert!(second < first / 4, "{first:?}, then {second:?}");
    let wrong = schema(
        json!({ "type": "object", "properties": (0..300).map(|at| (format!("name {at}"), json!({ "type": "x" }))).collect::<Value>() }),
    );
    assert!(submit(&engine, request(&wrong, None)).is_err());
    assert!(submit(&engine, request(&wrong, None)).is_err());
}
