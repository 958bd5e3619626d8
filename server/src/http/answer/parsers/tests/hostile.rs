//! Answers that are wrong on purpose, and long ones: nothing is lost and the time stays linear.

use std::time::Instant;

use proptest::prelude::*;

use super::*;

const FORMATS: [ToolFormat; 5] =
    [ToolFormat::Hermes, ToolFormat::Llama3Json, ToolFormat::Pythonic, ToolFormat::Mistral, ToolFormat::Json];

/// Bits of the formats, good and bad, put together at random.
const BITS: [&str; 44] = [
    "<tool_call>",
    "</tool_call>",
    "<tool",
    "_call>",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<think>",
    "</think>",
    "</",
    "\n",
    " ",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    ",",
    ";",
    ":",
    "\"",
    "\\",
    "'",
    "\"name\"",
    "\"arguments\"",
    "\"parameters\"",
    "\"f\"",
    "f",
    "search",
    "a=",
    "1",
    "null",
    "é",
    "😀",
    "{\"name\": \"f\", \"arguments\": ",
    "{\"a\": \"x\"}",
    "f(a=1)",
    "f[ARGS]",
    "<|im_end|>",
    "\"{}\"",
];

fn answers() -> impl Strategy<Value = Vec<&'static str>> {
    prop::collection::vec(prop::sample::select(&BITS[..]), 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cuts_never_matter(bits in answers(), format in prop::sample::select(&FORMATS[..]), think: bool, open: bool) {
        let config = ParserConfig {
            reasoning: think.then_some(ReasoningFormat::THINK),
            starts_in_reasoning: open,
            ..config(format)
        };
        let answer = bits.concat();
        let whole = parts(&config, pieces(&config, &[&answer]));
        let single: Vec<&str> = answer.split("").filter(|part| !part.is_empty()).collect();
        prop_assert_eq!(&parts(&config, pieces(&config, &bits)), &whole);
        prop_assert_eq!(&parts(&config, pieces(&config, &single)), &whole);
    }

    #[test]
    fn without_a_call_nothing_is_lost(bits in answers(), format in prop::sample::select(&FORMATS[..])) {
        let config = config(format);
        let answer = bits.concat();
        let whole = parts(&config, pieces(&config, &[&answer]));
        if !whole.iter().any(|part| matches!(part, Part::Call(..))) {
            let expected: Vec<Part> = if answer.is_empty() { vec![] } else { vec![text(&answer)] };
            prop_assert_eq!(whole, expected);
        }
    }

    #[test]
    fn every_letter_of_an_answer_comes_out(bits in answers(), format in prop::sample::select(&FORMATS[..])) {
        // Calls are taken apart and their names dropped, but a model's own words stay in their place.
        let config = config(format);
        let answer = format!("WORD{}WORD", bits.concat());
        let out = parts(&config, pieces(&config, &[&answer]));
        let words: usize = out.iter().map(|part| match part {
            Part::Text(text) | Part::Reasoning(text) | Part::Call(_, text) => text.matches("WORD").count(),
        }).sum();
        prop_assert_eq!(words, 2, "{:?}", out);
    }
}

/// Answers that make a careless reader look at the same text again and again, of about this length.
fn long_answers(length: usize) -> Vec<(ToolFormat, String)> {
    let times = |text: &str| text.repeat(length / text.len());
    let hermes = "<tool_call>{\"name\": \"f\", \"arguments\": ";
    vec![
        (ToolFormat::Hermes, format!("{hermes}{{\"a\": \"{}\"}}}}</tool_call>", times("x<\\\"</tool_call>"))),
        (ToolFormat::Hermes, format!("{hermes}{}", times("{\"a\":["))),
        (ToolFormat::Hermes, format!("{hermes}{{{}", times("</tool_call"))),
        (ToolFormat::Hermes, times("<tool_call>{\"x\": \"\\\"")),
        (ToolFormat::Hermes, times("<tool_call>")),
        (ToolFormat::Hermes, times("<tool_call")),
        (ToolFormat::Hermes, times("\n ")),
        (ToolFormat::Hermes, format!("<tool_call>{{\"arguments\": {{\"a\": \"{}", times("é"))),
        (ToolFormat::Hermes, format!("<tool_call>{{\"arguments\": \"{}", times("\\n"))),
        (ToolFormat::Hermes, format!("<tool_call>{{\"name\": \"{}", times("f"))),
        (ToolFormat::Hermes, format!("<tool_call>{{\"{}", times("k"))),
        (ToolFormat::Llama3Json, times("{\"name\": \"f\", \"parameters\": {}};")),
        (ToolFormat::Json, times("[{\"parameters\": {\"name\": ")),
        (ToolFormat::Json, times("[")),
        (ToolFormat::Mistral, times("[TOOL_CALLS]f[CALL_ID]")),
        (ToolFormat::Mistral, format!("[TOOL_CALLS]{}", times("f"))),
        (ToolFormat::Mistral, format!("[TOOL_CALLS]f[ARGS]{}", times("{"))),
        (ToolFormat::Pythonic, format!("[f(a={}", times("["))),
        (ToolFormat::Pythonic, format!("[f(a={}{})]", times("["), times("]"))),
        (ToolFormat::Pythonic, format!("[f(a=\"{}\")]", times("\\\"("))),
        (ToolFormat::Pythonic, format!("[f(a=1{}", times(", f(a=1)"))),
        (ToolFormat::Pythonic, format!("[f(){}", times(", f(a=1, b={'k': [1]})"))),
    ]
}

#[test]
fn long_answers_take_linear_time() {
    // As much text in one answer as in 16: a quadratic reader would take 16 times as long. The best of three, since
    // the machine has other work.
    let seconds = |format: ToolFormat, answer: &str| {
        let started = Instant::now();
        let config = ParserConfig { reasoning: Some(ReasoningFormat::THINK), ..config(format) };
        let mut parser = AnswerParser::new(&config);
        let mut pieces = Vec::new();
        let mut rest = answer;
        while !rest.is_empty() {
            let next = rest.char_indices().map(|(at, _)| at).nth(5).unwrap_or(rest.len());
            parser.push(&rest[..next], &mut pieces);
            pieces.clear();
            rest = &rest[next..];
        }
        parser.finish(&mut pieces);
        started.elapsed().as_secs_f64()
    };
    for ((format, short), (_, long)) in long_answers(4_000).into_iter().zip(long_answers(64_000)) {
        let best = |run: &dyn Fn() -> f64| (0..3).map(|_| run()).fold(f64::INFINITY, f64::min);
        let short = best(&|| (0..16).map(|_| seconds(format, &short)).sum());
        let time = best(&|| seconds(format, &long));
        let start: String = long.chars().take(40).collect();
        assert!(time < 6.0 * short, "{format}: {start:?} took {time} s in one answer and {short} s in 16");
    }
}

#[test]
fn deep_nesting_is_followed_without_recursion() {
    let deep = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let answer = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {deep}}}</tool_call>");
    let config = config(ToolFormat::Hermes);
    assert_eq!(parts(&config, pieces(&config, &[&answer])), [call("f", &deep)]);
}
