//! Thoughts before an answer: free, counted, and cut off.

use tidemill_engine::{
    Engine,
    ids::TokenId,
    output::FinishReason,
    request::{GenerateRequest, Prompt},
    sampling::SamplingParams,
    structured::{Structured, Thinking},
};

use crate::rig::{Answer, ENGINE, ask, choice, engine, refusal};

/// Marks of several tokens each.
const WORDS: [&str; 2] = ["<think>", "</think>"];
/// Marks that are one token each.
const TOKENS: [&str; 2] = ["<tool_call>", "</tool_call>"];

fn thinking([start, end]: [&str; 2], budget: Option<u32>) -> Option<Thinking> {
    Some(Thinking { start: start.into(), end: end.into(), budget })
}

fn request(prompt: &str, thinking: Option<Thinking>, structured: Option<Structured>) -> GenerateRequest {
    let sampling = SamplingParams {
        temperature: Some(1.0),
        seed: Some(5),
        max_tokens: Some(40),
        ..SamplingParams::default()
    };
    GenerateRequest { sampling, structured, thinking, ..GenerateRequest::new(Prompt::Text(prompt.into())) }
}

/// Only these tokens come where they may.
fn eager(mut request: GenerateRequest, text: &str) -> GenerateRequest {
    let ids = ENGINE.handle().text().encode(text, false).unwrap();
    request.sampling.logit_bias = ids.into_iter().map(|id| (id, 100.0)).collect();
    request
}

fn tokens_of(text: &str) -> Vec<TokenId> {
    ENGINE.handle().text().encode(text, false).unwrap()
}

fn opens(request: &GenerateRequest) -> bool {
    ENGINE.handle().validate(request.clone()).unwrap().opens_thinking()
}

#[test]
fn a_budget_cuts_thoughts_off_and_the_form_begins_behind_them() {
    for marks in [WORDS, TOKENS] {
        for budget in [0, 1, 7] {
            let prompt = format!("Once upon a time {}\n", marks[0]);
            let request = request(&prompt, thinking(marks, Some(budget)), Some(choice(&["the end"])));
            assert!(opens(&request));
            let answer = ask(&ENGINE, request).unwrap();
            let (thoughts, rest) = answer.text.split_once(marks[1]).unwrap();
            assert_eq!((rest, answer.reason()), ("the end", FinishReason::Stop), "{answer:?}");
            assert_eq!(answer.tokens[budget as usize..][..tokens_of(marks[1]).len()], tokens_of(marks[1]));
            assert_eq!(thoughts.is_empty(), budget == 0);
        }
    }
}

#[test]
fn thoughts_without_a_form_are_cut_off_as_well() {
    let mut request = request("Hello <think>", thinking(WORDS, Some(4)), None);
    request.sampling.ignore_eos = true;
    let answer = ask(&ENGINE, request.clone()).unwrap();
    let end = tokens_of(WORDS[1]);
    assert_eq!(answer.tokens[4..][..end.len()], end);
    assert_eq!((answer.tokens.len(), answer.reason()), (40, FinishReason::Length));
    // The very tokens that the model chooses without a budget, as far as it goes.
    request.thinking = thinking(WORDS, None);
    assert!(opens(&request));
    assert_eq!(ask(&ENGINE, request).unwrap().tokens[..4], answer.tokens[..4]);
}

#[test]
fn a_completion_may_begin_with_the_mark_itself() {
    let request = request("Hello", thinking(TOKENS, Some(3)), Some(choice(&["yes", "no"])));
    assert!(!opens(&request));
    let answer = ask(&ENGINE, eager(request.clone(), TOKENS[0])).unwrap();
    let thoughts = TOKENS[0].repeat(4) + TOKENS[1];
    assert!([thoughts.clone() + "yes", thoughts + "no"].contains(&answer.text), "{answer:?}");
    // Where it does not, the form applies from the first token on.
    let answer = ask(&ENGINE, eager(request, "y")).unwrap();
    assert_eq!(answer.text, "yes");
    let mut free = super::thinking::request("Hello", thinking(TOKENS, Some(3)), None);
    free.sampling.ignore_eos = true;
    let answer = ask(&ENGINE, eager(free, TOKENS[0])).unwrap();
    assert!(answer.text.starts_with(&(TOKENS[0].repeat(4) + TOKENS[1])), "{answer:?}");
}

#[test]
fn a_model_that_ends_its_thoughts_is_not_cut_off() {
    let form = || Some(choice(&["yes"]));
    for budget in [None, Some(30)] {
        let request = request("Hello <tool_call>", thinking(TOKENS, budget), form());
        assert_eq!(ask(&ENGINE, eager(request, TOKENS[1])).unwrap().text, "</tool_call>yes");
    }
    // It may not end its answer there.
    let request = request("Hello <tool_call>", thinking(TOKENS, Some(2)), form());
    let answer = ask(&ENGINE, eager(request, "<|im_end|>")).unwrap();
    assert!(answer.text.ends_with("</tool_call>yes") && answer.tokens.len() >= 4, "{answer:?}");
}

#[test]
fn a_prompt_that_ends_behind_thoughts_has_none() {
    let request = request("<think>\n\n</think>\n\n", thinking(WORDS, Some(0)), Some(choice(&["yes"])));
    assert!(!opens(&request));
    assert_eq!(ask(&ENGINE, request).unwrap().text, "yes");
}

#[test]
fn the_tokens_are_the_same_with_two_steps_in_flight_and_one_by_one() {
    let requests = |logprobs: Option<u32>| {
        [(WORDS, Some(9), None), (TOKENS, Some(3), Some(choice(&["red", "green"]))), (WORDS, Some(0), None)]
            .map(|(marks, budget, form)| {
                let mut request = request(&format!("A {}", marks[0]), thinking(marks, budget), form);
                request.sampling.logprobs = logprobs;
                request
            })
    };
    let all = |engine: &Engine, logprobs| {
        let tokens = |answer: Answer| answer.tokens;
        requests(logprobs).map(|request| tokens(ask(engine, request).unwrap()))
    };
    let expected = all(&ENGINE, None);
    assert_eq!(all(&ENGINE, Some(1)), expected, "each token chosen by itself");
    assert_eq!(all(&engine(true), None), expected, "two steps in flight");
}

#[test]
fn marks_that_are_none_are_refused() {
    for marks in [["", "</think>"], ["<think>", " "], ["<think>", &"x".repeat(100)]] {
        let (field, message) = refusal(request("Hello", thinking(marks, None), None));
        assert!(field == "thinking" && message.contains("bytes"), "{message}");
    }
}
