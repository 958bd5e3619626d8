//! Grammars of tool calls: what they accept is a call, and what is none they refuse.

use llguidance::{Matcher, ParserFactory, api::TopLevelGrammar};
use serde_json::json;
use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv};

use super::*;

/// A grammar, ready to be asked. `<|tool|>` and `<|/tool|>` are special tokens of its tokenizer, whose other tokens are
/// the bytes.
pub(super) struct Checker {
    tokens: TokEnv,
    matcher: Matcher,
}

impl Checker {
    pub(super) fn new(lark: &str) -> Self {
        let tokens: TokEnv = ApproximateTokEnv::single_byte_env();
        let factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &[]).unwrap();
        let matcher = Matcher::new(factory.create_parser(TopLevelGrammar::from_lark(lark.to_owned())));
        assert!(!matcher.is_error(), "{:?} in\n{lark}", matcher.get_error());
        Self { tokens, matcher }
    }

    /// Whether the grammar takes this text whole.
    pub(super) fn accepts(&self, text: &str) -> bool {
        let mut matcher = self.matcher.deep_clone();
        let marked = ["<|tool|>", "<|/tool|>"]
            .iter()
            .fold(text.as_bytes().to_vec(), |bytes, token| mark(&bytes, token));
        let (ids, _) = self.tokens.tokenize_bytes_marker(&marked);
        let taken = matcher.try_consume_tokens(&ids).unwrap();
        taken == ids.len() && matcher.is_accepting().unwrap()
    }
}

fn accepts(lark: &str, text: &str) -> bool {
    Checker::new(lark).accepts(text)
}

/// The text with the byte that announces a special token before each of this one.
fn mark(text: &[u8], token: &str) -> Vec<u8> {
    let mut marked = Vec::new();
    for (at, byte) in text.iter().enumerate() {
        if text[at..].starts_with(token.as_bytes()) {
            marked.push(0xff);
        }
        marked.push(*byte);
    }
    marked
}

fn tools() -> Vec<ToolDef> {
    let weather = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "unit": {"enum": ["C", "F", null]},
            "days": {"type": "array", "items": {"type": "integer"}},
            "exact": {"type": "boolean"}
        },
        "required": ["city"],
        "additionalProperties": false
    });
    vec![
        ToolDef { name: "get_weather".to_owned(), parameters: weather },
        ToolDef { name: "f".to_owned(), parameters: serde_json::Value::Null },
    ]
}

fn lark(
    format: ToolFormat,
    choice: ToolChoice,
    parallel: bool,
    special_token: &dyn Fn(&str) -> Option<u32>,
) -> String {
    tool_grammar(&ToolGrammar { format, tools: &tools(), choice, parallel, special_token }).unwrap()
}

fn no_special(_: &str) -> Option<u32> {
    None
}

const FORMATS: [ToolFormat; 5] =
    [ToolFormat::Hermes, ToolFormat::Llama3Json, ToolFormat::Pythonic, ToolFormat::Mistral, ToolFormat::Json];

/// One call as this format has it, with arguments in JSON or, for the pythonic format, as Python has them.
fn one(format: ToolFormat, name: &str, arguments: &str, python: &str) -> String {
    match format {
        ToolFormat::Hermes => {
            format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>")
        }
        ToolFormat::Llama3Json => format!("{{\"name\": \"{name}\", \"parameters\": {arguments}}}"),
        ToolFormat::Pythonic => format!("{name}({python})"),
        ToolFormat::Mistral | ToolFormat::Json => {
            format!("{{\"name\": \"{name}\", \"arguments\": {arguments}}}")
        }
    }
}

fn all(format: ToolFormat, calls: &[String]) -> String {
    match format {
        ToolFormat::Hermes => calls.join("\n"),
        ToolFormat::Llama3Json => calls.join("; "),
        ToolFormat::Pythonic | ToolFormat::Json => format!("[{}]", calls.join(", ")),
        ToolFormat::Mistral => format!("[TOOL_CALLS][{}]", calls.join(", ")),
    }
}

#[test]
fn calls_that_the_schema_allows_are_accepted_and_read_back() {
    let good = [
        ("get_weather", "{\"city\": \"Rome\"}", "city=\"Rome\""),
        ("get_weather", "{\"city\": \"\"}", "city=\"\""),
        (
            "get_weather",
            "{\"city\": \"R\\\"m\", \"unit\": null, \"days\": [1, -2], \"exact\": true}",
            "city=\"R\\\"m\", unit=None, days=[1, -2], exact=True",
        ),
        ("get_weather", "{\"city\": \"Zürich\", \"days\": []}", "city=\"Zürich\", days=[]"),
        ("f", "{}", ""),
    ];
    for format in FORMATS {
        let required = lark(format, ToolChoice::Required, true, &no_special);
        for (name, arguments, python) in good {
            let answer = all(format, &[one(format, name, arguments, python)]);
            assert!(accepts(&required, &answer), "{answer} in\n{required}");
            assert_eq!(read(&config(format), &answer), [call(name, arguments)]);
        }
        let several: Vec<String> =
            good.iter().map(|(name, json, python)| one(format, name, json, python)).collect();
        let answer = all(format, &several);
        assert!(accepts(&required, &answer), "{answer} in\n{required}");
        let expected: Vec<Part> = good.iter().map(|(name, arguments, _)| call(name, arguments)).collect();
        assert_eq!(read(&config(format), &answer), expected);
    }
}

#[test]
fn anything_else_is_refused() {
    let bad = [
        ("get_weather", "{}", ""),
        ("get_weather", "{\"city\": 1}", "city=1"),
        ("get_weather", "{\"city\": \"Rome\", \"unit\": \"K\"}", "city=\"Rome\", unit=\"K\""),
        ("get_weather", "{\"city\": \"Rome\", \"other\": 1}", "city=\"Rome\", other=1"),
        ("get_weather", "{\"city\": \"Rome\", \"days\": [1.5]}", "city=\"Rome\", days=[1.5]"),
        ("get_weather", "{\"city\": \"Rome\"", "city=\"Rome"),
        ("get_weather", "[]", "[]"),
        ("get_wea", "{}", ""),
        ("nobody", "{}", ""),
        ("f", "{\"a\": 1}", "a=1"),
        ("f", "\"{}\"", "{}"),
    ];
    for format in FORMATS {
        let required = lark(format, ToolChoice::Required, true, &no_special);
        for (name, arguments, python) in bad {
            let answer = all(format, &[one(format, name, arguments, python)]);
            assert!(!accepts(&required, &answer), "{answer} in\n{required}");
        }
        let f = one(format, "f", "{}", "");
        for answer in
            ["Hello".to_owned(), format!("{} ", all(format, std::slice::from_ref(&f))), all(format, &[])]
        {
            assert!(!accepts(&required, &answer), "{answer:?} in\n{required}");
        }
        let (single, two) = (all(format, std::slice::from_ref(&f)), all(format, &[f.clone(), f]));
        let lone = lark(format, ToolChoice::Required, false, &no_special);
        assert!(accepts(&lone, &single) && !accepts(&lone, &two), "{lone}");
        let named = lark(format, ToolChoice::Named("f"), true, &no_special);
        let weather = all(format, &[one(format, "get_weather", "{\"city\": \"Rome\"}", "city=\"Rome\"")]);
        assert!(accepts(&named, &two) && !accepts(&named, &weather), "{named}");
    }
}

#[test]
fn marks_that_are_special_tokens_are_written_as_tokens() {
    let tokens = ApproximateTokEnv::single_byte_env();
    let id = |text: &str| tokens.tok_trie().get_special_token(text).unwrap();
    let special = |mark: &str| match mark {
        "<tool_call>" | "[TOOL_CALLS]" => Some(id("<|tool|>")),
        "</tool_call>" | "[ARGS]" => Some(id("<|/tool|>")),
        _ => None,
    };
    // The special tokens of this tokenizer stand for the format's own.
    let hermes = lark(ToolFormat::Hermes, ToolChoice::Named("f"), false, &special);
    assert!(accepts(&hermes, "<|tool|>\n{\"name\": \"f\", \"arguments\": {}}\n<|/tool|>"), "{hermes}");
    assert!(!accepts(&hermes, "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>"), "{hermes}");
    let mistral = lark(ToolFormat::Mistral, ToolChoice::Required, true, &special);
    assert!(
        accepts(&mistral, "<|tool|>f<|/tool|>{}<|tool|>get_weather<|/tool|>{\"city\": \"Rome\"}"),
        "{mistral}"
    );
    assert!(!accepts(&mistral, "<|tool|>nobody<|/tool|>{}"), "{mistral}");
}

#[test]
fn special_marks_may_be_given_for_ordinary_tokens_too() {
    // Whoever asks need not know whether a token is a special one.
    let byte = |mark: &str| (mark == "<tool_call>").then_some(u32::from(b'!'));
    let hermes = lark(ToolFormat::Hermes, ToolChoice::Named("f"), false, &byte);
    assert!(accepts(&hermes, "!\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>"), "{hermes}");
}

#[test]
fn tools_without_sense_are_refused_in_words() {
    let ask = |tools: &[ToolDef], choice: ToolChoice, format: ToolFormat| {
        tool_grammar(&ToolGrammar { format, tools, choice, parallel: true, special_token: &no_special })
    };
    let error = |parameters: serde_json::Value, format: ToolFormat| {
        ask(&[ToolDef { name: "f".to_owned(), parameters }], ToolChoice::Required, format).unwrap_err()
    };
    assert!(ask(&[], ToolChoice::Required, ToolFormat::Json).unwrap_err().contains("there are no tools"));
    let unknown = ask(&tools(), ToolChoice::Named("g"), ToolFormat::Json).unwrap_err();
    assert!(unknown.contains("\"g\"") && unknown.contains("not among"), "{unknown}");
    assert!(error(json!([1]), ToolFormat::Json).contains("not a JSON Schema object"));
    assert!(error(json!({"type": "string"}), ToolFormat::Json).contains("arguments are an object"));
    let strange = json!({"properties": {"a b": {}}});
    assert!(error(strange, ToolFormat::Pythonic).contains("\"a b\""));
    let lost = json!({"properties": {"a": {"$ref": "#/$defs/x"}}});
    assert!(error(lost, ToolFormat::Pythonic).contains("#/$defs/x"));
    let mut deep = json!({"type": "integer"});
    for _ in 0..100 {
        deep = json!({"type": "array", "items": deep});
    }
    assert!(error(json!({"properties": {"a": deep}}), ToolFormat::Pythonic).contains("nested"));
}

#[test]
fn pythonic_schemas_may_nest_and_refer_to_themselves() {
    let parameters = json!({
        "$defs": {"tree": {
            "type": "object",
            "properties": {"v": {"type": "number"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["v"]
        }},
        "properties": {
            "t": {"$ref": "#/$defs/tree"},
            "u": {"anyOf": [{"type": "string"}, {"type": "null"}, {"const": 7}]},
            "w": {"type": ["integer", "boolean"]},
            "free": {"type": "object"}
        }
    });
    let tools = [
        ToolDef { name: "f".to_owned(), parameters },
        ToolDef { name: "g".to_owned(), parameters: json!({}) },
    ];
    let grammar = tool_grammar(&ToolGrammar {
        format: ToolFormat::Pythonic,
        tools: &tools,
        choice: ToolChoice::Required,
        parallel: true,
        special_token: &no_special,
    })
    .unwrap();
    for good in [
        "[f()]",
        "[f(t={\"v\": 1.5, \"kids\": [{\"v\": 2}, {\"v\": 3, \"kids\": []}]})]",
        "[f(u=None, w=True, free={\"a\": [1, 'x', None]})]",
        "[f(u=7), f(u=\"x\", w=3)]",
        "[g(), g(any_name={\"a\": 1}, b=[True])]",
    ] {
        assert!(accepts(&grammar, good), "{good} in\n{grammar}");
        let config =
            ParserConfig { tool_names: ["f", "g"].map(str::to_owned).into(), ..config(ToolFormat::Pythonic) };
        let calls = read(&config, good);
        assert!(calls.iter().all(|part| matches!(part, Part::Call(..))), "{calls:?}");
    }
    for bad in ["[f(t={})]", "[f(u=8)]", "[f(w=1.5)]", "[f(w=1, u=None)]", "[f(free=[])]"] {
        assert!(!accepts(&grammar, bad), "{bad} in\n{grammar}");
    }
}
