//! Tool calls, format by format.

use super::*;

fn reads(format: ToolFormat, answer: &str, expected: &[Part]) {
    assert_eq!(read(&config(format), answer), expected, "{format}: {answer}");
}

fn stays_text(format: ToolFormat, answer: &str) {
    reads(format, answer, &[text(answer)]);
}

#[test]
fn hermes() {
    let one = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Zürich \\\"}<\\\"\", \"n\": [1, {}]}}\n</tool_call>";
    let weather = call("get_weather", "{\"city\": \"Zürich \\\"}<\\\"\", \"n\": [1, {}]}");
    let f = call("f", "{}");
    reads(ToolFormat::Hermes, one, std::slice::from_ref(&weather));
    let two =
        format!("Let me see.\n\n{one}\n<tool_call>\n{{\"name\":\"f\",\"arguments\":{{}}}}\n</tool_call>\n");
    reads(ToolFormat::Hermes, &two, &[text("Let me see."), weather.clone(), f.clone()]);
    let after = format!("{one}\n\nDone, I <3 it.");
    reads(ToolFormat::Hermes, &after, &[weather, text("\n\nDone, I <3 it.")]);
    for answer in [
        "<tool_call>{\"arguments\": {}, \"name\": \"f\"}</tool_call>",
        "<tool_call>{\"name\": \"f\"}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": null}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": \"{}\"}</tool_call>",
        "<tool_call>{\"id\": 7, \"x\": [\"]\"], \"name\": \"\\u0066\", \"arguments\": {}}}\n</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": {}, \"why\": {\"a\": 1}}",
    ] {
        reads(ToolFormat::Hermes, answer, std::slice::from_ref(&f));
    }
    let marks = "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":\"</tool_call><tool_call>\"}}</tool_call>";
    reads(ToolFormat::Hermes, marks, &[call("f", "{\"a\":\"</tool_call><tool_call>\"}")]);
}

#[test]
fn hermes_that_is_wrong() {
    for answer in [
        "Write <tool_call> to call, </tool_call> to end.",
        "<tool_call>\n{\"name\": \"unknown\", \"arguments\": {}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"f\", \"arguments\": [1]}\n</tool_call>",
        "<tool_call>\n{\"name\": \"f\", \"arguments\": \"no object\"}\n</tool_call>",
        "<tool_call>\n{'name': 'f'}\n</tool_call>",
        "<tool_call>\n{\"arguments\": {}}\n</tool_call>",
        "<tool_call>\n{\"arguments\": {\"a\": 1</tool_call> so",
        "  <tool_call> \n {\"name\": \"get_wea",
        "<tool_ca",
        "a < b, a <t b, a <<tool_cal> b",
    ] {
        stays_text(ToolFormat::Hermes, answer);
    }
    // Once begun, a call keeps its arguments, bad or cut short.
    let bad = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": <<b> 1</tool_call>\nSo.";
    reads(ToolFormat::Hermes, bad, &[call("f", "{\"a\": <<b> 1"), text("\nSo.")]);
    let cut = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1 </too";
    reads(ToolFormat::Hermes, cut, &[call("f", "{\"a\": 1 </too")]);
    let wrong = "<tool_call>{\"name\": \"f\", \"arguments\": {}, oh}</tool_call>";
    reads(ToolFormat::Hermes, wrong, &[call("f", "{}"), text("oh}</tool_call>")]);
}

#[test]
fn llama() {
    let f = call("f", "{\"a\": 1}");
    let g = call("search", "{}");
    for answer in [
        "{\"name\": \"f\", \"parameters\": {\"a\": 1}}",
        "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\": 1}}",
        "\n {\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"a\": 1}}\n",
        "{\"parameters\": {\"a\": 1}, \"name\": \"f\"}",
    ] {
        reads(ToolFormat::Llama3Json, answer, std::slice::from_ref(&f));
    }
    for separator in ["; ", "\n", ";\n", "", ", "] {
        let answer = format!(
            "{{\"name\": \"f\", \"parameters\": {{\"a\": 1}}}}{separator}{{\"name\": \"search\", \"parameters\": {{}}}}"
        );
        reads(ToolFormat::Llama3Json, &answer, &[f.clone(), g.clone()]);
    }
    let mixed = "Let me look.<|python_tag|>{\"name\": \"search\", \"parameters\": {}}";
    reads(ToolFormat::Llama3Json, mixed, &[text("Let me look."), g]);
    for answer in [
        "{\"name\": \"Alice\", \"parameters\": {}}",
        "{\"name\": \"f\"}",
        "{\"name\": \"f\", \"age\": 7, \"parameters\": {}}",
        "{\"city\": \"Paris\", \"name\": \"f\"}",
        "{\"name\": [\"f\"]}",
        "[{\"name\": \"f\", \"parameters\": {}}]",
        "Use {\"name\": \"f\", \"parameters\": {}}",
        "<|python_tag|>f.call(query=\"x\")",
    ] {
        stays_text(ToolFormat::Llama3Json, answer);
    }
}

#[test]
fn json() {
    let f = call("f", "{\"a\": [\"}\"]}");
    for answer in [
        "{\"name\": \"f\", \"arguments\": {\"a\": [\"}\"]}}",
        "[{\"name\": \"f\", \"parameters\": {\"a\": [\"}\"]}}]",
        "\n[ {\"name\": \"f\", \"arguments\": {\"a\": [\"}\"]}} ]\n",
    ] {
        reads(ToolFormat::Json, answer, std::slice::from_ref(&f));
    }
    let two =
        "[{\"name\": \"f\", \"arguments\": {\"a\": [\"}\"]}}, {\"name\": \"search\", \"arguments\": {}}]";
    reads(ToolFormat::Json, two, &[f.clone(), call("search", "{}")]);
    let half =
        "[{\"name\": \"f\", \"arguments\": {\"a\": [\"}\"]}}, {\"name\": \"nobody\", \"arguments\": {}}]";
    reads(ToolFormat::Json, half, &[f, text(", {\"name\": \"nobody\", \"arguments\": {}}]")]);
    for answer in
        ["[1, 2]", "[]", "[{\"a\": 1}]", "{}", "{", "[ ", "[[{\"name\": \"f\", \"arguments\": {}}]]", "null"]
    {
        stays_text(ToolFormat::Json, answer);
    }
}

#[test]
fn mistral() {
    let f = call("f", "{\"a\": \"[TOOL_CALLS]\"}");
    let g = call("search", "{}");
    for answer in [
        "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": \"[TOOL_CALLS]\"}}]",
        "[TOOL_CALLS][{\"arguments\": {\"a\": \"[TOOL_CALLS]\"}, \"name\": \"f\", \"id\": \"abcdefghi\"}]",
        "[TOOL_CALLS]{\"name\": \"f\", \"arguments\": {\"a\": \"[TOOL_CALLS]\"}}",
        "[TOOL_CALLS]f[ARGS]{\"a\": \"[TOOL_CALLS]\"}",
        "[TOOL_CALLS]f{\"a\": \"[TOOL_CALLS]\"}",
        "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{\"a\": \"[TOOL_CALLS]\"}",
    ] {
        reads(ToolFormat::Mistral, answer, std::slice::from_ref(&f));
    }
    let old = "Now.\n[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": \"[TOOL_CALLS]\"}}, {\"name\": \"search\", \"arguments\": {}}]";
    reads(ToolFormat::Mistral, old, &[text("Now."), f.clone(), g.clone()]);
    let new = "[TOOL_CALLS]f[ARGS]{\"a\": \"[TOOL_CALLS]\"}[TOOL_CALLS]search[ARGS]{}";
    reads(ToolFormat::Mistral, new, &[f, g]);
    for answer in [
        "[TOOL_CALLS]nobody[ARGS]{}",
        "[TOOL_CALLS]f[ARGS]",
        "[TOOL_CALLS]f[OTHER]{}",
        "[TOOL_CALLS]f said",
        "[TOOL_CALLS] [[",
        "[TOOL_CALLS",
        "[1] and [T2]",
        "[{\"name\": \"f\", \"arguments\": {}}]",
    ] {
        stays_text(ToolFormat::Mistral, answer);
    }
}

#[test]
fn pythonic() {
    let f = |arguments: &str| call("f", arguments);
    for (written, expected) in [
        ("", "{}"),
        ("a=1", "{\"a\": 1}"),
        ("a=1, b='x', c=None,", "{\"a\": 1, \"b\": \"x\", \"c\": null}"),
        (
            "a=[1, -2.5, .5, True], b={'k': (False,), \"l\": {}}",
            "{\"a\": [1, -2.5, 0.5, true], \"b\": {\"k\": [false], \"l\": {}}}",
        ),
        ("a = 'it\\'s \"so\"\\n\\x41\\ud83d\\ude00'", "{\"a\": \"it's \\\"so\\\"\\nA😀\"}"),
        ("a=\"), [g()] (\"", "{\"a\": \"), [g()] (\"}"),
        ("a=1e-3, b=+2, c=3.", "{\"a\": 1e-3, \"b\": 2, \"c\": 3.0}"),
    ] {
        reads(ToolFormat::Pythonic, &format!("[f({written})]"), &[f(expected)]);
    }
    let two = " [f(a=1), search(q=\"x\")]\n";
    reads(ToolFormat::Pythonic, two, &[f("{\"a\": 1}"), call("search", "{\"q\": \"x\"}")]);
    let marked = "Well<|python_start|>[f(), search()]<|python_end|>";
    reads(ToolFormat::Pythonic, marked, &[text("Well"), f("{}"), call("search", "{}")]);
    let half = "[f(), nobody(a=1)] so";
    reads(ToolFormat::Pythonic, half, &[f("{}"), text(", nobody(a=1)] so")]);
    let after = "[f()] f() it is";
    reads(ToolFormat::Pythonic, after, &[f("{}"), text("] f() it is")]);
    for answer in [
        "[f(1)]",
        "[f(a=b)]",
        "[f(a=1 b=2)]",
        "[f(a=1, a=2)]",
        "[f(a=01)]",
        "[f(a=b\"x\")]",
        "[f(a={1: 2})]",
        "[f(a=1",
        "[nobody()]",
        "[1] is a note",
        "[]",
        "[f]",
        "See [f()]",
    ] {
        stays_text(ToolFormat::Pythonic, answer);
    }
}

#[test]
fn arguments_stream_as_they_are_written() {
    for (format, begun, cut) in [
        (
            ToolFormat::Hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"long",
            "{\"a\": \"long",
        ),
        (ToolFormat::Llama3Json, "{\"name\": \"f\", \"parameters\": {\"a\": \"long", "{\"a\": \"long"),
        (ToolFormat::Json, "[{\"name\": \"f\", \"parameters\": {", "{"),
        (ToolFormat::Mistral, "[TOOL_CALLS]f[ARGS]{\"a\": [1, ", "{\"a\": [1, "),
        (ToolFormat::Mistral, "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a", "{\"a"),
        (ToolFormat::Pythonic, "[f(a=1)", "{\"a\": 1}"),
    ] {
        assert_eq!(so_far(&config(format), begun), [call("f", cut)], "{format}");
    }
}

#[test]
fn text_is_not_held_back_longer_than_needed() {
    assert_eq!(so_far(&config(ToolFormat::Hermes), "a < b <tool"), [text("a < b")]);
    assert_eq!(so_far(&config(ToolFormat::Hermes), "a < b <tool "), [text("a < b <tool")]);
    assert_eq!(so_far(&config(ToolFormat::Llama3Json), "{\"city\":"), [text("{\"city\":")]);
    assert_eq!(so_far(&config(ToolFormat::Llama3Json), "{\"name\": \"Al\""), [text("{\"name\": \"Al\"")]);
    assert_eq!(so_far(&config(ToolFormat::Pythonic), "[1"), [text("[1")]);
    let none = ParserConfig { tools: Some(ToolFormat::Hermes), ..ParserConfig::default() };
    assert_eq!(so_far(&none, "no tools \n<tool_call>"), [text("no tools \n<tool_call>")]);
}

#[test]
fn special_tokens_never_reach_the_text() {
    let special_tokens: Arc<[String]> =
        ["<|im_end|>", "[TOOL_CALLS]", "<|python_tag|>"].map(str::to_owned).into();
    let mistral = ParserConfig { special_tokens: special_tokens.clone(), ..config(ToolFormat::Mistral) };
    assert_eq!(read(&mistral, "a<|im_end|>b <|im_|"), [text("ab <|im_|")]);
    assert_eq!(read(&mistral, "[TOOL_CALLS]nobody[ARGS]{}"), [text("nobody[ARGS]{}")]);
    let llama = ParserConfig { special_tokens: special_tokens.clone(), ..config(ToolFormat::Llama3Json) };
    assert_eq!(read(&llama, "<|python_tag|>print(1)<|im_end|>"), [text("print(1)")]);
    assert_eq!(
        read(&llama, "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}<|im_end|>"),
        [call("f", "{}")]
    );
    let thinking = ParserConfig { reasoning: Some(ReasoningFormat::THINK), ..plain_with(&special_tokens) };
    assert_eq!(read(&thinking, "<think>a<|im_end|>b</think>c"), [reasoning("ab"), text("c")]);
    let plain = plain_with(&special_tokens);
    assert_eq!(read(&plain, "a <|im_end|> b"), [text("a  b")]);
}

fn plain_with(special_tokens: &Arc<[String]>) -> ParserConfig {
    ParserConfig { special_tokens: special_tokens.clone(), ..ParserConfig::default() }
}
