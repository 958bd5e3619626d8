//! Forms over vocabularies of different kinds, without a model: whatever is chosen among the allowed tokens, the text matches.

use std::sync::Arc;

use serde_json::{Value, json};
use tidemill_engine::{
    RequestError,
    constraint::Allowed,
    ids::TokenId,
    structured::{Structured, Thinking},
    text::{
        TextModel,
        grammar::{FormRequest, Forms},
    },
};

use crate::folder::{byte_fallback_decoder, demo, metaspace_decoder, sentencepiece, with_tokenizer};

struct Walk {
    text: TextModel,
    forms: Forms,
    eos: Vec<TokenId>,
    luck: u64,
}

impl Walk {
    fn new(text: TextModel, eos: &[u32]) -> Self {
        let eos: Vec<TokenId> = eos.iter().copied().map(TokenId).collect();
        Self { forms: Forms::new(Arc::new(text.clone()), eos.clone()), text, eos, luck: 1 }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.luck = self.luck.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.luck >> 33) as usize % bound
    }

    /// One of the tokens that are allowed.
    fn choose(&mut self, allowed: &Allowed) -> TokenId {
        let mask = allowed.mask().expect("a grammar is never indifferent");
        let vocab = self.text.vocab_size() as u32;
        let ids: Vec<u32> = (0..vocab).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        assert!(!ids.is_empty() && mask.len() == self.text.vocab_size().div_ceil(32));
        TokenId(ids[self.below(ids.len())])
    }

    /// What a completion says as it is shown; none when it is not over after 200 tokens.
    fn walk(&mut self, structured: &Structured, jump_ahead: bool) -> Result<Option<String>, RequestError> {
        let request = FormRequest { structured: Some(structured), thinking: None, prompt: &[], jump_ahead };
        let mut constraint = self.forms.compile(request)?.constraint.expect("a form was asked for");
        let (mut allowed, mut ids) = (constraint.first(), Vec::new());
        while ids.len() < 200 {
            let token = self.choose(&allowed);
            if self.eos.contains(&token) {
                return Ok(Some(self.text.decode(&ids, true)?));
            }
            ids.push(token);
            let advance = constraint.advance(token, 200 - ids.len()).unwrap();
            assert!(jump_ahead || advance.forced.is_empty());
            ids.extend(advance.forced);
            match advance.then {
                Some(next) => allowed = next,
                None => return Ok(Some(self.text.decode(&ids, true)?)),
            }
        }
        Ok(None)
    }

    /// Of many walks, each that ends passes `check`, and some do.
    #[track_caller]
    fn all_match(&mut self, structured: &Structured, check: impl Fn(&str) -> bool) {
        let mut ended = 0;
        for round in 0..60 {
            if let Some(text) = self.walk(structured, round % 2 == 0).unwrap() {
                assert!(check(&text), "{text:?}");
                ended += 1;
            }
        }
        assert!(ended > 10, "{ended} of 60 ended");
    }
}

/// Vocabularies that have every byte; the last is of a model that has no way to say that it is done.
fn kinds() -> [Walk; 3] {
    let pieces = with_tokenizer(&sentencepiece(byte_fallback_decoder())).unwrap();
    [Walk::new(pieces, &[2]), Walk::new(demo(), &[2042, 2040]), Walk::new(demo(), &[])]
}

/// A vocabulary of a few letters, whose decoder drops the mark of a space at the start of a text.
fn letters() -> Walk {
    Walk::new(with_tokenizer(&sentencepiece(metaspace_decoder())).unwrap(), &[2])
}

#[test]
fn texts_match_where_tokens_are_bytes_and_where_a_space_is_dropped_at_the_start() {
    let hello = Structured::Regex("(hello|to)( hello| to| 中é){0,3}\\.".into());
    let choice =
        Structured::Choice(["hello", "to hell and back", "é中 ", "{\"a\": 1}"].map(String::from).into());
    let schema = json!({ "type": "object", "properties": { "hello to": { "enum": ["to", 7, null] }, "b": { "type": "boolean" } },
        "required": ["hello to", "b"], "additionalProperties": false });
    let schema = Structured::JsonSchema(schema.to_string().into());
    let greets = |text: &str| {
        let mut words = text.strip_suffix('.').unwrap_or_default().split(' ');
        words.all(|word| ["hello", "to", "中é"].contains(&word))
    };
    letters().all_match(&hello, greets);
    for mut walk in kinds() {
        walk.all_match(&hello, greets);
        walk.all_match(&choice, |text| ["hello", "to hell and back", "é中 ", "{\"a\": 1}"].contains(&text));
        walk.all_match(&schema, |text| {
            let value: Value = serde_json::from_str(text).unwrap();
            value.as_object().is_some_and(|value| value.len() == 2) && value["b"].is_boolean()
        });
    }
}

#[test]
fn what_a_model_cannot_begin_with_is_refused() {
    let [mut pieces, mut walk, _] = kinds();
    // Its decoder drops the first space of every text.
    let error = pieces.walk(&Structured::Regex(" hello".into()), true).unwrap_err();
    assert!(error.to_string().contains("begin an answer with"), "{error}");
    assert_eq!(walk.walk(&Structured::Regex(" hello".into()), true).unwrap().unwrap(), " hello");
}

#[test]
fn special_tokens_stand_in_grammars_by_name_and_never_for_text() {
    let mut walk = Walk::new(demo(), &[2042, 2040]);
    let by_name = Structured::Lark("start: <|pad|> \"x\" <|im_start|> \"y\"".into());
    assert_eq!(walk.walk(&by_name, true).unwrap().unwrap(), "<|pad|>x<|im_start|>y");
    let as_text = Structured::Choice(["<|pad|>".to_owned()].into());
    let request = FormRequest { structured: Some(&as_text), thinking: None, prompt: &[], jump_ahead: true };
    let first = walk.forms.compile(request).unwrap().constraint.unwrap().first();
    assert_ne!(walk.choose(&first), TokenId(2043), "the text is not the token");
    assert_eq!(walk.walk(&as_text, true).unwrap().unwrap(), "<|pad|>");
}

#[test]
fn a_lower_case_letter_may_come_as_a_letter_and_as_a_byte() {
    let text = with_tokenizer(&sentencepiece(byte_fallback_decoder())).unwrap();
    let ids: Vec<u32> = (0..400).filter(|&id| text.token_bytes(TokenId(id)) == b"h").collect();
    assert_eq!(ids.len(), 2);
    let walk = Walk::new(text, &[2]);
    let structured = Structured::Regex("h".into());
    let request =
        FormRequest { structured: Some(&structured), thinking: None, prompt: &[], jump_ahead: true };
    let first = walk.forms.compile(request).unwrap().constraint.unwrap().first();
    let mask = first.mask().unwrap();
    assert!(ids.iter().all(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1), "{ids:?}");
}

#[test]
fn thoughts_and_form_follow_each_other_token_by_token() {
    let walk = Walk::new(demo(), &[2042, 2040]);
    let prompt = walk.text.encode("Why? <think>", false).unwrap();
    let thinking = Thinking { start: "<think>".into(), end: "</think>".into(), budget: Some(2) };
    let structured = Structured::Choice(["so".to_owned()].into());
    let request = FormRequest {
        structured: Some(&structured),
        thinking: Some(&thinking),
        prompt: &prompt,
        jump_ahead: true,
    };
    let form = walk.forms.compile(request).unwrap();
    assert!(form.opens_thinking);
    let mut constraint = form.constraint.unwrap();
    let word = walk.text.encode(" word", false).unwrap()[0];
    let advance = constraint.advance(word, 50).unwrap();
    assert!(advance.forced.is_empty());
    let mut fork = constraint.fork();
    let advance = constraint.advance(word, 50).unwrap();
    assert_eq!(walk.text.decode(&advance.forced, true).unwrap(), "</think>");
    let answer = walk.text.encode("so", false).unwrap();
    let mask = advance.then.unwrap().mask().unwrap().clone();
    assert!(mask[answer[0].0 as usize / 32] >> (answer[0].0 % 32) & 1 == 1);
    // With less room than the mark takes, as much of it as there is room for.
    let cut = fork.advance(word, 1).unwrap();
    assert_eq!((cut.forced.len(), cut.then.is_some()), (1, true));
}
