//! Engines, requests and their answers.

use std::sync::LazyLock;

use tidemill_engine::{
    Engine, EngineConfig, Generation, RequestError,
    ids::TokenId,
    model::ModelSource,
    output::{Finish, FinishReason, TokenLogprobs},
    request::{GenerateRequest, Prompt},
    sampling::SamplingParams,
    structured::Structured,
    text::chat::{ChatMessage, ChatPrompt},
};

/// One engine for all tests that need no other.
pub static ENGINE: LazyLock<Engine> = LazyLock::new(|| engine(false));

/// A small engine, with two steps in flight or one.
pub fn engine(look_ahead: bool) -> Engine {
    let config = EngineConfig {
        max_num_batched_tokens: Some(64),
        look_ahead: Some(look_ahead),
        ..EngineConfig::new(ModelSource::Builtin)
    };
    Engine::start(config, |_| ()).unwrap()
}

pub fn schema(schema: serde_json::Value) -> Structured {
    Structured::JsonSchema(schema.to_string().into())
}

pub fn regex(expression: &str) -> Structured {
    Structured::Regex(expression.into())
}

pub fn choice(texts: &[&str]) -> Structured {
    Structured::Choice(texts.iter().map(|text| (*text).to_owned()).collect())
}

pub fn chat(text: &str) -> Prompt {
    Prompt::Chat(ChatPrompt::new(vec![ChatMessage::new("user", text)]))
}

/// A conversation to be answered in a form: greedily, or at a temperature of 2.
pub fn request(structured: &Structured, seed: Option<u64>) -> GenerateRequest {
    let sampling = SamplingParams {
        temperature: Some(if seed.is_some() { 2.0 } else { 0.0 }),
        top_p: Some(1.0),
        seed,
        max_tokens: Some(150),
        ..SamplingParams::default()
    };
    let structured = Some(structured.clone());
    GenerateRequest { sampling, structured, ..GenerateRequest::new(chat("Tell me about the sea.")) }
}

/// What came of one completion.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    pub text: String,
    pub tokens: Vec<TokenId>,
    pub logprobs: Vec<TokenLogprobs>,
    pub finish: Option<Finish>,
}

impl Answer {
    pub fn reason(&self) -> FinishReason {
        self.finish.as_ref().unwrap().reason
    }

    /// It ended by itself, and not for want of tokens.
    pub fn is_whole(&self) -> bool {
        self.reason() == FinishReason::Stop
    }
}

pub fn submit(engine: &Engine, request: GenerateRequest) -> Result<Generation, RequestError> {
    let handle = engine.handle();
    handle.submit(handle.validate(request)?)
}

/// All completions of a request.
pub fn collect(mut generation: Generation, n: usize) -> Result<Vec<Answer>, RequestError> {
    let mut answers = vec![Answer::default(); n];
    while let Some(output) = generation.next_blocking() {
        let output = output?;
        let answer = &mut answers[output.index as usize];
        assert!(answer.finish.is_none(), "nothing follows a completion's end");
        answer.text += &output.text;
        answer.tokens.extend(output.token_ids);
        answer.logprobs.extend(output.logprobs);
        answer.finish = output.finish;
    }
    for answer in &answers {
        let finish = answer.finish.as_ref().expect("every completion ends");
        assert_eq!(finish.usage.completion_tokens, answer.tokens.len());
    }
    Ok(answers)
}

pub fn ask(engine: &Engine, request: GenerateRequest) -> Result<Answer, RequestError> {
    Ok(collect(submit(engine, request)?, 1)?.remove(0))
}

/// Why a request is refused.
pub fn refusal(request: GenerateRequest) -> (&'static str, String) {
    match ENGINE.handle().validate(request) {
        Err(RequestError::Invalid(violations)) => (violations[0].field, violations[0].message.clone()),
        other => panic!("{other:?}"),
    }
}

/// Greedy, and with many seeds: each whole answer passes `check`, and there are some.
#[track_caller]
pub fn all_match(structured: &Structured, seeds: u64, check: impl Fn(&str) -> bool) {
    let mut whole = 0;
    for seed in std::iter::once(None).chain((0..seeds).map(Some)) {
        let answer = ask(&ENGINE, request(structured, seed)).unwrap();
        assert_ne!(answer.text, "", "{seed:?}");
        if answer.is_whole() {
            whole += 1;
            assert!(check(&answer.text), "{seed:?}: {}", answer.text);
        }
    }
    assert!(whole > seeds / 4, "{whole} of {seeds} are whole");
}
