//! Random and damaged input: an error or a result, never a panic.

use proptest::prelude::*;
use tidemill_engine::{
    ids::TokenId,
    text::{ChatMessage, ChatPrompt},
};

use crate::folder::{byte_fallback_decoder, demo, folder, load, sentencepiece};

const TEMPLATE: &str = include_str!("../../assets/demo/chat_template.jinja");

fn json_value() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        "\\PC{0,12}".prop_map(Into::into),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
            prop::collection::vec(("(function|name|arguments|[a-z]{0,3})", inner), 0..4)
                .prop_map(|pairs| serde_json::Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// Flips bits of `bytes` at places that a seed chooses.
fn damaged(bytes: &[u8], flips: &[(prop::sample::Index, u8)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (place, bit) in flips {
        let place = place.index(bytes.len());
        bytes[place] ^= 1 << (bit % 8);
    }
    bytes
}

fn flips() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_conversation_renders_or_is_refused(
        turns in prop::collection::vec(("(system|user|assistant|tool|\\PC{0,5})", "\\PC{0,20}", prop::option::of(json_value())), 0..5),
        tools in prop::option::of(json_value()),
        add_generation_prompt: bool,
    ) {
        let messages = turns.into_iter().map(|(role, content, tool_calls)| ChatMessage { tool_calls, ..ChatMessage::new(role, content) });
        let prompt = ChatPrompt { tools, add_generation_prompt, ..ChatPrompt::new(messages.collect()) };
        let _ = DEMO.render_chat(&prompt);
    }

    #[test]
    fn any_text_encodes(text in "(\\PC|<\\|im_end\\|>|\0|\u{feff}|\u{2028}){0,60}", special: bool) {
        let ids = DEMO.encode(&text, special).unwrap();
        prop_assert!(ids.iter().all(|id| id.0 < 2048));
    }

    #[test]
    fn any_ids_decode_or_are_refused(ids in prop::collection::vec(any::<u32>().prop_map(|id| TokenId(id % 3000)), 0..20)) {
        let _ = DEMO.decode(&ids, true);
        let mut detokenizer = DEMO.detokenizer(true);
        for id in ids {
            detokenizer.push(id);
        }
        detokenizer.finish();
    }

    #[test]
    fn damaged_tokenizers_load_or_are_refused(flips in flips()) {
        let tokenizer = sentencepiece(byte_fallback_decoder()).to_string();
        let dir = folder(&[("tokenizer.json", &damaged(tokenizer.as_bytes(), &flips))]);
        match load(dir.path()) {
            Ok(model) => {
                let _ = model.encode("hello 中 😀", true);
            }
            Err(error) => prop_assert!(error.to_string().contains("tokenizer.json")),
        }
    }

    #[test]
    fn damaged_templates_load_or_are_refused(flips in flips(), garbage in "[{}%#|() a-z'\\-.\\[\\]]{0,40}") {
        let tokenizer = sentencepiece(byte_fallback_decoder()).to_string();
        for template in [damaged(TEMPLATE.as_bytes(), &flips), garbage.into_bytes()] {
            let dir = folder(&[("tokenizer.json", tokenizer.as_bytes()), ("chat_template.jinja", &template)]);
            match load(dir.path()) {
                Ok(model) => {
                    let message = ChatMessage::new("user", "x");
                    let _ = model.render_chat(&ChatPrompt::new(vec![message]));
                }
                Err(error) => prop_assert!(error.to_string().contains("chat_template.jinja")),
            }
        }
    }

    #[test]
    fn random_bytes_are_no_tokenizer(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(load(folder(&[("tokenizer.json", &bytes)]).path()).is_err());
    }
}

static DEMO: std::sync::LazyLock<tidemill_engine::text::TextModel> = std::sync::LazyLock::new(demo);

/// A stack overflow would end the process, not the request.
#[test]
fn deep_nesting_cannot_overflow_the_stack() {
    let expression = |unit: &str| format!("{{{{ {}1 }}}}", unit.repeat(130_000 / unit.len()));
    let templates = [
        expression("("),
        expression("["),
        expression("{1:"),
        expression("-"),
        expression("not "),
        expression("1~"),
        expression("1**"),
        expression("1 if 1 else "),
        expression("a|e and "),
        format!("{{{{ a{} }}}}", ".a".repeat(60_000)),
        format!("{{{{ a{} }}}}", "[0]".repeat(40_000)),
        "{% if x %}".repeat(13_000),
        "{% macro f() %}".repeat(8_000),
        format!("{{% if a %}}{}{{% endif %}}", "{%elif a%}".repeat(13_000)),
        // As deep a value as the fuel allows; it is dropped recursively.
        "{% set ns = namespace(x=1) %}{% for a in range(10000) %}{% for b in range(1000) %}\
         {% set ns.x = [ns.x] %}{% endfor %}{% endfor %}"
            .to_owned(),
    ];
    let tokenizer = sentencepiece(byte_fallback_decoder()).to_string();
    for template in templates {
        let files: [(&str, &[u8]); 2] =
            [("tokenizer.json", tokenizer.as_bytes()), ("chat_template.jinja", template.as_bytes())];
        match load(folder(&files).path()) {
            Ok(model) => {
                let prompt = ChatPrompt::new(vec![]);
                let _ = model.render_chat(&prompt);
            }
            Err(error) => assert!(error.to_string().contains("chat_template.jinja"), "{error}"),
        }
    }
}

#[test]
fn a_deeply_nested_tokenizer_is_refused() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let nested = format!(
        "{{\"normalizer\": {}null{}}}",
        "{\"type\": \"Sequence\", \"normalizers\": [".repeat(50_000),
        "]}".repeat(50_000)
    );
    for text in [deep, nested] {
        let error = load(folder(&[("tokenizer.json", text.as_bytes())]).path()).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn a_gigantic_template_is_refused() {
    let tokenizer = sentencepiece(byte_fallback_decoder()).to_string();
    let large = "x".repeat(200_000);
    let config = serde_json::json!({ "chat_template": large }).to_string();
    for (name, text) in [("chat_template.jinja", &large), ("tokenizer_config.json", &config)] {
        let dir = folder(&[("tokenizer.json", tokenizer.as_bytes()), (name, text.as_bytes())]);
        let error = load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("131072"), "{error}");
    }
}
