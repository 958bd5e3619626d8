use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill_engine::{
    error::{ErrorCode, LoadError, RequestError},
    model::{ModelFiles, ModelSource, ModelSpec},
    text::{ChatMessage, ChatPrompt, TextModel},
};

use crate::folder::{byte_fallback_decoder, folder, load, sentencepiece};

const TOKENIZER_CONFIG: &str = r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>"}"#;

fn dir(extra: &[(&str, &[u8])]) -> TempDir {
    let tokenizer = sentencepiece(byte_fallback_decoder()).to_string();
    let mut files: Vec<(&str, &[u8])> = vec![
        ("tokenizer.json", tokenizer.as_bytes()),
        ("tokenizer_config.json", TOKENIZER_CONFIG.as_bytes()),
    ];
    files.extend(extra);
    folder(&files)
}

fn model(template: &str) -> TextModel {
    load(dir(&[("chat_template.jinja", template.as_bytes())]).path()).unwrap()
}

fn user(content: &str) -> ChatPrompt {
    let message = ChatMessage::new("user", content);
    ChatPrompt::new(vec![message])
}

#[derive(Deserialize)]
struct Goldens {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    messages: Vec<Message>,
    tools: Option<Value>,
    add_generation_prompt: bool,
    text: String,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
    tool_calls: Option<Value>,
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let goldens: Goldens =
        serde_json::from_str(include_str!("../fixtures/templates/chat_templates.json")).unwrap();
    let mut failures = Vec::new();
    for case in goldens.cases {
        let message =
            |m: Message| ChatMessage { tool_calls: m.tool_calls, ..ChatMessage::new(m.role, m.content) };
        let prompt = ChatPrompt {
            tools: case.tools,
            add_generation_prompt: case.add_generation_prompt,
            ..ChatPrompt::new(case.messages.into_iter().map(message).collect())
        };
        match model(&case.template).render_chat(&prompt) {
            Ok(text) if text == case.text => {}
            other => failures.push(format!("{}\n  want {:?}\n  got  {other:?}", case.name, case.text)),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The texts are those of transformers 5.23 with `continue_final_message=True`.
#[test]
fn a_last_message_that_is_gone_on_from_stays_open() {
    let chatml = "{%- for m in messages %}{{- '<' + m.role + '>' + m.content + '</>\n' }}{%- endfor %}\
                  {%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}";
    let trimming = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}";
    let open = |template: &str, content: &str| {
        let messages = vec![ChatMessage::new("user", "Why?"), ChatMessage::new("assistant", content)];
        let prompt = ChatPrompt { continue_final_message: true, ..ChatPrompt::new(messages) };
        model(template).render_chat(&prompt)
    };
    for (template, content, want) in [
        (chatml, "Because", "<user>Why?</>\n<assistant>Because"),
        (chatml, " Because ", "<user>Why?</>\n<assistant> Because "),
        (chatml, "Why?", "<user>Why?</>\n<assistant>Why?"),
        (chatml, "", "<user>Why?</>\n<assistant>"),
        (trimming, " Because ", "[user] Why?</s>[assistant] Because"),
    ] {
        assert_eq!(open(template, content).unwrap(), want, "{content:?}");
    }
    let deaf = open("{{ messages[0].content }}", "Because").unwrap_err();
    assert!(deaf.to_string().contains("leaves the last message out"), "{deaf}");
    let nothing = ChatPrompt { continue_final_message: true, ..ChatPrompt::new(Vec::new()) };
    assert!(model(chatml).render_chat(&nothing).is_err());
}

/// Written by Python 3.12's `json.dumps`.
#[test]
fn tojson_writes_numbers_as_python_does() {
    let template = "{{ tools | tojson }}";
    let numbers = r#"[1.0, 1e16, 1.5e-7, 0.0001, 1e-5, -0.0, 123456789012345680.0, 18446744073709551615, -3, 1e300, 5e-324]"#;
    let want = "[1.0, 1e+16, 1.5e-07, 0.0001, 1e-05, -0.0, 1.2345678901234568e+17, 18446744073709551615, -3, 1e+300, 5e-324]";
    let prompt = ChatPrompt { tools: Some(serde_json::from_str(numbers).unwrap()), ..user("") };
    assert_eq!(model(template).render_chat(&prompt).unwrap(), want);
}

#[test]
fn raise_exception_reaches_the_client_as_it_is() {
    let model = model("{{ raise_exception('Roles must alternate: ' + messages[0].role) }}");
    match model.render_chat(&user("x")).unwrap_err() {
        RequestError::Invalid(list) => {
            assert_eq!(list[0].field, "prompt.chat");
            assert_eq!(list[0].message, "Roles must alternate: user");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_model_without_template_says_what_to_do() {
    let model = load(dir(&[]).path()).unwrap();
    assert!(!model.has_chat_template());
    let error = model.render_chat(&user("x")).unwrap_err();
    assert_eq!(error.code(), ErrorCode::FailedPrecondition);
    assert!(error.to_string().contains("--chat-template"), "{error}");
}

#[test]
fn a_template_that_does_not_compile_fails_at_load_time() {
    for template in
        ["{% for m in messages %}{{ m.content }", "{%}", "{%", "{% generation %}", "{% endgeneration %}"]
    {
        let dir = dir(&[("chat_template.jinja", template.as_bytes())]);
        let error = load(dir.path()).unwrap_err();
        assert!(matches!(error, LoadError::Format { .. }));
        assert!(error.to_string().contains("chat_template.jinja"), "{template}: {error}");
    }
}

#[test]
fn templates_come_from_the_override_then_the_file_then_the_config() {
    let list = json!({"chat_template": [
        {"name": "default", "template": "default {{ messages[0].content }}"},
        {"name": "tool_use", "template": "tools {{ tools | length }}"},
        {"name": "rag", "template": "{% broken"}]});
    let folder = dir(&[("tokenizer_config.json", list.to_string().as_bytes())]);
    let from_config = load(folder.path()).unwrap();
    assert_eq!(from_config.render_chat(&user("x")).unwrap(), "default x");
    let with_tools = ChatPrompt { tools: Some(json!([1, 2])), ..user("x") };
    assert_eq!(from_config.render_chat(&with_tools).unwrap(), "tools 2");

    std::fs::write(folder.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(load(folder.path()).unwrap().render_chat(&user("x")).unwrap(), "file");

    let own = folder.path().join("own.jinja");
    std::fs::write(&own, "{{ bos_token }}own{{ eos_token }}").unwrap();
    let source = ModelSource::Dir(folder.path().to_path_buf());
    let files = ModelFiles::open(&source).unwrap().with_chat_template(own);
    std::fs::write(folder.path().join("tokenizer_config.json"), TOKENIZER_CONFIG).unwrap();
    let spec = ModelSpec::load(&files).unwrap();
    assert_eq!(TextModel::load(&files, &spec).unwrap().render_chat(&user("x")).unwrap(), "<s>own</s>");

    let missing = ModelFiles::open(&source).unwrap().with_chat_template("/nowhere/x.jinja");
    let error = TextModel::load(&missing, &spec).unwrap_err();
    assert!(error.to_string().contains("/nowhere/x.jinja"), "{error}");
}

#[test]
fn the_clock_is_formatted_as_strftime_does() {
    let text = model("{{ strftime_now('%Y-%m-%d %d %b %Y') }}").render_chat(&user("")).unwrap();
    assert_eq!(text.len(), "2025-01-31 31 Jan 2025".len(), "{text}");
    model("{{ strftime_now('%!') }}").render_chat(&user("")).unwrap_err();
}

#[test]
fn templates_that_run_away_end_in_an_error() {
    let nest = "{% set ns = namespace(x=[]) %}{% for i in range(300) %}{% set ns.x = [ns.x] %}{% endfor %}";
    let endless = [
        (
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            "too long to render",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion limit"),
        ("{% for a in range(100000) %}{{ 'x' * 10000 }}{% endfor %}", "more than 16777216 bytes"),
        ("{{ 'x' * 1000000000000 }}", "too large"),
        (&format!("{nest}{{{{ ns.x | tojson }}}}"), "nested too deeply"),
        ("{% include 'other' %}", "other"),
        ("{{ messages[0].nothing.there }}", "undefined"),
        ("{{ messages[0].content.nothing() }}", "nothing"),
    ];
    for (template, reason) in endless {
        let model = model(template);
        let start = Instant::now();
        let error = model.render_chat(&user("x")).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument, "{template}: {error}");
        assert!(error.to_string().contains(reason), "{template}: {error}");
        assert!(start.elapsed() < Duration::from_secs(10), "{template} took {:?}", start.elapsed());
    }
}

#[test]
fn too_many_messages_are_refused() {
    let message = user("x").messages.remove(0);
    let prompt = ChatPrompt { messages: vec![message; 4097], ..user("") };
    assert_eq!(model("x").render_chat(&prompt).unwrap_err().code(), ErrorCode::InvalidArgument);
}

#[test]
fn a_long_conversation_fits_the_limits() {
    let message = ChatMessage { content: "word ".repeat(400), ..user("").messages.remove(0) };
    let prompt = ChatPrompt { messages: vec![message; 4096], ..user("") };
    let text = crate::folder::demo().render_chat(&prompt).unwrap();
    assert!(text.len() > 4096 * 2000);
}
