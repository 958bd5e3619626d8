//! Thoughts, names of formats, and templates.

use super::*;

fn think() -> ParserConfig {
    ParserConfig { reasoning: Some(ReasoningFormat::THINK), ..config(ToolFormat::Hermes) }
}

fn opened() -> ParserConfig {
    ParserConfig { starts_in_reasoning: true, ..think() }
}

#[test]
fn thoughts_are_split_from_the_answer() {
    let answer = "<think>\nFirst.\n\nThen </thin and\n</think>\n\nThe answer.\n";
    let expected = [reasoning("First.\n\nThen </thin and"), text("The answer.\n")];
    assert_eq!(read(&think(), answer), expected);
    assert_eq!(read(&opened(), answer), expected);
    assert_eq!(read(&opened(), answer.strip_prefix("<think>\n").unwrap()), expected);
    assert_eq!(read(&think(), &format!("\n\n{answer}")), expected);
    let plain = ParserConfig { tools: None, ..think() };
    assert_eq!(read(&plain, answer), expected);
    let mistral = ParserConfig { reasoning: Some(ReasoningFormat::MISTRAL), ..config(ToolFormat::Mistral) };
    assert_eq!(
        read(&mistral, "[THINK]a [/T] b[/THINK]c[TOOL_CALLS]f[ARGS]{}"),
        [reasoning("a [/T] b"), text("c"), call("f", "{}")]
    );
}

#[test]
fn calls_follow_thoughts() {
    let answer = "<think>\nA <tool_call>?\n</think>\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    assert_eq!(read(&think(), answer), [reasoning("A <tool_call>?"), call("f", "{}")]);
}

#[test]
fn an_answer_without_thoughts_is_text() {
    assert_eq!(read(&think(), "Hi <think>no</think>\n"), [text("Hi <think>no</think>\n")]);
    assert_eq!(read(&think(), "<think>\n\n</think>\n\nHi"), [text("Hi")]);
    assert_eq!(read(&think(), " <thin"), [text(" <thin")]);
    assert_eq!(read(&think(), ""), []);
    let none = ParserConfig { reasoning: None, ..think() };
    assert_eq!(read(&none, "<think>a</think>"), [text("<think>a</think>")]);
}

#[test]
fn an_answer_that_ends_within_thoughts_is_all_thought() {
    assert_eq!(read(&think(), "<think>\nSo, <tool_call>\n</thi"), [reasoning("So, <tool_call>\n</thi")]);
    assert_eq!(read(&opened(), "<thin"), [reasoning("<thin")]);
    assert_eq!(read(&opened(), "a\n\n"), [reasoning("a\n\n")]);
    assert_eq!(so_far(&opened(), "a\n</"), [reasoning("a")]);
}

#[test]
fn parsers_have_names() {
    for (name, format) in [
        ("hermes", ToolFormat::Hermes),
        ("llama3_json", ToolFormat::Llama3Json),
        ("llama4_json", ToolFormat::Llama3Json),
        ("pythonic", ToolFormat::Pythonic),
        ("llama4_pythonic", ToolFormat::Pythonic),
        ("mistral", ToolFormat::Mistral),
        ("json", ToolFormat::Json),
    ] {
        assert_eq!(name.parse(), Ok(ParserChoice::Fixed(format)));
        assert_eq!(format.to_string().parse(), Ok(ParserChoice::Fixed(format)));
    }
    for name in ["think", "qwen3", "deepseek_r1"] {
        assert_eq!(name.parse(), Ok(ParserChoice::Fixed(ReasoningFormat::THINK)));
    }
    let auto: ParserChoice<ToolFormat> = "auto".parse().unwrap();
    assert_eq!(auto.resolve(Some(ToolFormat::Json)), Some(ToolFormat::Json));
    let off: ParserChoice<ToolFormat> = "none".parse().unwrap();
    assert_eq!(off.resolve(Some(ToolFormat::Json)), None);
    assert_eq!((auto.to_string(), off.to_string()), ("auto".to_owned(), "none".to_owned()));
    let error = "gpt".parse::<ParserChoice<ToolFormat>>().unwrap_err().to_string();
    assert_eq!(
        error,
        "there is no parser named \"gpt\"; use one of auto, none, hermes, qwen25, llama3_json, llama4_json, llama3, \
         pythonic, llama4_pythonic, mistral, json"
    );
}

#[test]
fn templates_show_their_formats() {
    let think = Some(ReasoningFormat::THINK);
    for (source, expected) in [
        (
            include_str!("../../../../../../engine/assets/demo/chat_template.jinja"),
            (Some(ToolFormat::Hermes), None),
        ),
        // Qwen 2.5, Qwen 3 and QwQ, Hermes 3.
        (
            "<tool_call>\\n{\\\"name\\\": <function-name>, \\\"arguments\\\": <args-json-object>}\\n</tool_call>",
            (Some(ToolFormat::Hermes), None),
        ),
        (
            "{{- '\\n<tool_call>\\n{\"name\": \"' }} {%- if '</think>' in content %}",
            (Some(ToolFormat::Hermes), think),
        ),
        // Llama 3.1, 3.2 and the JSON template for Llama 4; then the pythonic ones.
        (
            "{{- 'Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}.' }}",
            (Some(ToolFormat::Llama3Json), None),
        ),
        (
            "{{- '{\"name\": \"' + tool_call.name + '\", ' }}{{- '\"parameters\": ' }}",
            (Some(ToolFormat::Llama3Json), None),
        ),
        (
            "{{- 'Respond in the format [func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)] ' }}",
            (Some(ToolFormat::Pythonic), None),
        ),
        (
            "- Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]",
            (Some(ToolFormat::Pythonic), None),
        ),
        // Mistral v3 and v11, Magistral.
        ("{{- \"[TOOL_CALLS] [\" }}", (Some(ToolFormat::Mistral), None)),
        (
            "{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }} [THINK] {{ thinking }} [/THINK]",
            (Some(ToolFormat::Mistral), Some(ReasoningFormat::MISTRAL)),
        ),
        // DeepSeek-R1 and its distillations; forms that are not read.
        ("{{'<｜tool▁calls▁begin｜>'}}{% set content = content.split('</think>')[-1] %}", (None, think)),
        ("<tool_call>\\n<function=example_function_name>\\n<parameter=x>", (None, None)),
        ("<tool_call>{function-name}\\n<arg_key>{arg-key-1}</arg_key></think>", (None, think)),
        ("<seed:think>{{ thought }}</seed:think></think>", (None, Some(ReasoningFormat::SEED_OSS))),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", (None, None)),
    ] {
        assert_eq!(detect(source), expected, "{source}");
    }
}
