//! Forms in company: other completions, other requests, preemption, aborts.

use serde_json::json;
use tidemill_engine::{
    Engine, EngineConfig,
    ids::TokenId,
    model::ModelSource,
    request::{GenerateRequest, Prompt},
    sampling::SamplingParams,
    structured::Structured,
};

use crate::rig::{Answer, ENGINE, ask, chat, choice, collect, engine, regex, request, schema, submit};

fn forms() -> Vec<Structured> {
    let fields = json!({ "type": "object", "properties": { "first": { "type": "integer" }, "second": { "enum": ["x", "y"] } },
        "required": ["first", "second"], "additionalProperties": false });
    vec![
        schema(fields),
        regex("[a-z]{3,20}( [a-z]{1,9}){2,9}"),
        choice(&["one", "two", "three"]),
        Structured::JsonObject,
    ]
}

/// Free and constrained requests, alternating.
fn mixed() -> Vec<GenerateRequest> {
    let free = |seed: u64| GenerateRequest {
        sampling: SamplingParams {
            temperature: Some(1.0),
            seed: Some(seed),
            max_tokens: Some(90),
            ignore_eos: true,
            frequency_penalty: (seed % 2 == 1).then_some(0.4),
            ..SamplingParams::default()
        },
        ..GenerateRequest::new(chat("Say something."))
    };
    (0..).zip(forms()).flat_map(|(seed, form)| [free(seed), request(&form, Some(seed))]).collect()
}

fn together(engine: &Engine, requests: Vec<GenerateRequest>) -> Vec<Answer> {
    let generations: Vec<_> = requests.into_iter().map(|request| submit(engine, request).unwrap()).collect();
    generations.into_iter().map(|generation| collect(generation, 1).unwrap().remove(0)).collect()
}

fn tokens(answers: &[Answer]) -> Vec<Vec<TokenId>> {
    answers.iter().map(|answer| answer.tokens.clone()).collect()
}

#[test]
fn everybody_gets_what_they_get_alone_with_one_step_in_flight_and_with_two() {
    let alone: Vec<Answer> = mixed().into_iter().map(|request| ask(&ENGINE, request).unwrap()).collect();
    for look_ahead in [false, true] {
        let engine = engine(look_ahead);
        assert_eq!(tokens(&together(&engine, mixed())), tokens(&alone), "look-ahead: {look_ahead}");
    }
}

#[test]
fn completions_of_one_request_differ_and_all_keep_the_form() {
    let mut request = request(&regex("[a-z]{8,30}\\."), Some(4));
    request.sampling.n = Some(3);
    let answers = collect(submit(&ENGINE, request).unwrap(), 3).unwrap();
    for answer in &answers {
        let word = answer.text.strip_suffix('.').unwrap_or_default();
        assert!(
            (8..=30).contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_lowercase()),
            "{answer:?}"
        );
    }
    assert!(answers[0].text != answers[1].text || answers[1].text != answers[2].text);
}

#[test]
fn a_preempted_answer_goes_on_as_if_nothing_had_happened() {
    let alone: Vec<Answer> = mixed().into_iter().map(|request| ask(&ENGINE, request).unwrap()).collect();
    let config = EngineConfig {
        max_num_batched_tokens: Some(64),
        look_ahead: Some(true),
        // Not enough for all of them at once.
        kv_cache_memory: Some(384 << 10),
        max_model_len: Some(192),
        ..EngineConfig::new(ModelSource::Builtin)
    };
    let engine = Engine::start(config, |_| ()).unwrap();
    assert_eq!(tokens(&together(&engine, mixed())), tokens(&alone));
    let preemptions = engine.handle().stats().counters.preemptions;
    assert!(preemptions > 0, "{:?}", engine.handle().stats());
}

#[test]
fn an_abort_in_the_middle_leaves_nothing_behind_and_harms_nobody() {
    let long = schema(
        json!({ "type": "array", "items": { "type": "integer", "maximum": 99, "minimum": 10 }, "minItems": 60 }),
    );
    let mut asked = request(&long, Some(1));
    asked.sampling.max_tokens = Some(400);
    let mut generation = submit(&ENGINE, asked.clone()).unwrap();
    let beside = submit(&ENGINE, request(&choice(&["beside"]), None)).unwrap();
    for _ in 0..5 {
        generation.next_blocking().unwrap().unwrap();
    }
    drop(generation);
    assert_eq!(collect(beside, 1).unwrap()[0].text, "beside");
    let again = GenerateRequest { prompt: Prompt::Text("Again".into()), ..asked };
    assert!(ask(&ENGINE, again).unwrap().text.starts_with('['));
}
