//! Every kind of form: whole answers match it, whatever the model would rather say.

use serde_json::{Value, json};
use tidemill_engine::{
    output::FinishReason, request::GenerateRequest, sampling::SamplingParams, structured::Structured,
};

use crate::rig::{ENGINE, all_match, ask, choice, refusal, regex, request, schema};

fn parse(text: &str) -> Option<Value> {
    serde_json::from_str(text).ok()
}

#[test]
fn any_json_object() {
    all_match(&Structured::JsonObject, 30, |text| parse(text).is_some_and(|value| value.is_object()));
}

#[test]
fn a_nested_schema() {
    let form = schema(json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "minLength": 1, "maxLength": 12 },
            "kind": { "enum": ["fish", "Wal 🐋", "a \"shell\"", null, 7] },
            "legs": { "type": "integer", "minimum": 0, "maximum": 10 },
            "depth": { "type": "number", "minimum": -1.5, "maximum": 1.5 },
            "tags": { "type": "array", "items": { "enum": ["a", "b"] }, "minItems": 1, "maxItems": 3 },
            "home": {
                "type": "object",
                "properties": { "sea": { "type": "boolean" }, "of": { "$ref": "#/$defs/town" } },
                "required": ["sea", "of"],
                "additionalProperties": false
            }
        },
        "required": ["name", "kind", "legs", "depth", "tags", "home"],
        "additionalProperties": false,
        "$defs": { "town": { "anyOf": [{ "type": "null" }, { "const": "Aalesund" }] } }
    }));
    all_match(&form, 40, |text| {
        let Some(value) = parse(text) else { return false };
        let name = value["name"].as_str().map_or(0, |name| name.chars().count());
        let kinds = [json!("fish"), json!("Wal 🐋"), json!("a \"shell\""), Value::Null, json!(7)];
        let tags = value["tags"].as_array().cloned().unwrap_or_default();
        let home = &value["home"];
        value.as_object().is_some_and(|value| value.len() == 6)
            && (1..=12).contains(&name)
            && kinds.contains(&value["kind"])
            && value["legs"].as_i64().is_some_and(|legs| (0..=10).contains(&legs))
            && value["depth"].as_f64().is_some_and(|depth| (-1.5..=1.5).contains(&depth))
            && (1..=3).contains(&tags.len())
            && tags.iter().all(|tag| tag == "a" || tag == "b")
            && home["sea"].is_boolean()
            && (home["of"].is_null() || home["of"] == "Aalesund")
    });
}

#[test]
fn a_recursive_schema() {
    let form = schema(json!({
        "$ref": "#/$defs/list",
        "$defs": {
            "list": {
                "type": "object",
                "properties": { "n": { "type": "integer" }, "next": { "anyOf": [{ "type": "null" }, { "$ref": "#/$defs/list" }] } },
                "required": ["n", "next"],
                "additionalProperties": false
            }
        }
    }));
    all_match(&form, 20, |text| {
        let mut value = parse(text);
        while let Some(node) = value.filter(|value| !value.is_null()) {
            if !node["n"].is_number() || node.as_object().is_none_or(|node| node.len() != 2) {
                return false;
            }
            value = Some(node["next"].clone());
        }
        true
    });
}

#[test]
fn texts_in_strings_are_whole_characters_and_escaped_where_they_must_be() {
    let form = schema(json!({ "type": "string", "maxLength": 24 }));
    all_match(
        &form,
        40,
        |text| matches!(parse(text), Some(Value::String(text)) if text.chars().count() <= 24 && !text.contains('\u{FFFD}')),
    );
    let form = schema(json!({ "type": "string", "pattern": "^[äöüß€🐋]{3,6}$" }));
    all_match(
        &form,
        20,
        |text| matches!(parse(text), Some(Value::String(text)) if text.chars().all(|c| "äöüß€🐋".contains(c))),
    );
}

#[test]
fn regular_expressions() {
    let is_date = |text: &str| {
        let parts: Vec<&str> = text.split('-').collect();
        parts.len() == 3 && parts[0].len() == 4 && parts.iter().all(|part| part.parse::<u32>().is_ok())
    };
    all_match(&regex(r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]"), 30, is_date);
    all_match(&regex(r"^[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]$"), 5, is_date);
    all_match(&regex("[a-z]{1,8}/[A-Z]\n\\t?\\$"), 30, |text| {
        let Some((word, rest)) = text.split_once('/') else { return false };
        word.bytes().all(|c| c.is_ascii_lowercase()) && ["\n$", "\n\t$"].contains(&&rest[1..])
    });
    all_match(&regex("(?:ja|nein|👍)+"), 30, |text| {
        text.replace("ja", "").replace("nein", "").replace('👍', "").is_empty()
    });
}

#[test]
fn a_choice_of_texts() {
    let texts = ["yes", "no", "yes and no", "a \"quote\"\n\\ and 🐋", "<|im_end|>", "</tool_call>", " x"];
    all_match(&choice(&texts), 40, |text| texts.contains(&text));
    let answer = ask(&ENGINE, request(&choice(&["nothing else will do"]), None)).unwrap();
    assert_eq!((answer.text.as_str(), answer.reason()), ("nothing else will do", FinishReason::Stop));
}

#[test]
fn a_grammar() {
    let form = Structured::Lark(
        "start: sum\nsum: term (\"+\" term)*\nterm: NUMBER | \"(\" sum \")\"\nNUMBER: /[1-9][0-9]{0,3}/\n"
            .into(),
    );
    all_match(&form, 40, |text| {
        let open = text.bytes().filter(|byte| *byte == b'(').count();
        let numbers = text.split(['+', '(', ')']).filter(|part| !part.is_empty());
        text.bytes().filter(|byte| *byte == b')').count() == open
            && numbers.into_iter().all(|number| number.parse::<u32>().is_ok_and(|n| (1..10_000).contains(&n)))
            && !text.contains("++")
            && !text.ends_with('+')
    });
}

#[test]
fn a_form_that_is_not_complete_ends_for_want_of_tokens() {
    let mut long = request(&schema(json!({ "type": "string", "minLength": 400 })), None);
    long.sampling.max_tokens = Some(12);
    let answer = ask(&ENGINE, long).unwrap();
    assert_eq!((answer.reason(), answer.tokens.len()), (FinishReason::Length, 12));
    assert!(answer.text.starts_with('"'));
}

#[test]
fn an_answer_that_is_complete_with_its_last_token_ends_well() {
    let form = choice(&["nothing else will do"]);
    let all = ask(&ENGINE, request(&form, None)).unwrap().tokens.len() as u32;
    for (max_tokens, reason) in [(all, FinishReason::Stop), (all - 1, FinishReason::Length)] {
        let mut request = request(&form, None);
        request.sampling.max_tokens = Some(max_tokens);
        let answer = ask(&ENGINE, request).unwrap();
        assert_eq!((answer.reason(), answer.tokens.len()), (reason, max_tokens as usize));
    }
}

#[test]
fn log_probabilities_come_for_each_token_and_change_none() {
    let form = schema(json!({
        "type": "object",
        "properties": { "a rather long name": { "type": "integer" } },
        "required": ["a rather long name"],
        "additionalProperties": false
    }));
    let plain = ask(&ENGINE, request(&form, Some(3))).unwrap();
    let mut asked = request(&form, Some(3));
    asked.sampling.logprobs = Some(2);
    let scored = ask(&ENGINE, asked).unwrap();
    assert_eq!(
        (&scored.text, &scored.tokens),
        (&plain.text, &plain.tokens),
        "forced or chosen, it is the same token"
    );
    assert_eq!((scored.logprobs.len(), plain.logprobs.len()), (scored.tokens.len(), 0));
    // Of the raw logits: what the grammar left may have been the last that the model thought of.
    assert!(scored.logprobs.iter().any(|l| l.rank > 2) && scored.logprobs.iter().all(|l| l.top.len() == 2));
}

#[test]
fn tokens_that_may_not_end_it_do_not_while_the_form_can_go_on() {
    let mut form = request(&regex("[a-z ]+"), Some(1));
    (form.sampling.min_tokens, form.sampling.max_tokens) = (Some(20), Some(40));
    let answer = ask(&ENGINE, form).unwrap();
    assert!(answer.tokens.len() >= 20, "{answer:?}");
    // A form that is complete comes before a number of tokens.
    let mut short = request(&choice(&["yes"]), None);
    short.sampling.min_tokens = Some(20);
    assert_eq!(ask(&ENGINE, short).unwrap().text, "yes");
}

#[test]
fn a_stop_string_ends_it_where_the_client_said() {
    let form = schema(json!({ "type": "array", "items": { "const": "wave" }, "minItems": 3, "maxItems": 3 }));
    let mut request = request(&form, None);
    request.sampling.stop = vec!["ve\"".into()];
    let answer = ask(&ENGINE, request).unwrap();
    assert_eq!(
        (answer.text.trim_start_matches(['[', ' ', '\n']), answer.reason()),
        ("\"wa", FinishReason::Stop)
    );
}

#[test]
fn penalties_and_biases_work_beside_a_form() {
    for seed in 0..10 {
        let mut request = request(&regex("(ab|ba|c){4,12}"), Some(seed));
        let sampling = &mut request.sampling;
        (sampling.repetition_penalty, sampling.frequency_penalty) = (Some(1.3), Some(0.5));
        (sampling.top_k, sampling.min_p) = (Some(5), Some(0.01));
        let answer = ask(&ENGINE, request).unwrap();
        assert!(answer.is_whole() && answer.text.bytes().all(|byte| b"abc".contains(&byte)), "{answer:?}");
    }
}

#[test]
fn what_contradicts_a_form_is_refused() {
    let asked =
        |sampling: SamplingParams| GenerateRequest { sampling, ..request(&Structured::JsonObject, None) };
    let endless = SamplingParams { ignore_eos: true, ..SamplingParams::default() };
    let (field, message) = refusal(asked(endless));
    assert_eq!(field, "sampling.ignore_eos");
    assert!(message.contains("structured"), "{message}");
}
