//! Answers as models write them, cut at every place.

mod calls;
mod ebnf;
mod grammars;
mod hostile;
mod thoughts;

use super::*;

/// A piece without its id, for comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Reasoning(String),
    Text(String),
    Call(String, String),
}

fn reasoning(text: &str) -> Part {
    Part::Reasoning(text.to_owned())
}

fn text(text: &str) -> Part {
    Part::Text(text.to_owned())
}

fn call(name: &str, arguments: &str) -> Part {
    Part::Call(name.to_owned(), arguments.to_owned())
}

const TOOLS: [&str; 3] = ["get_weather", "search", "f"];

fn config(tools: ToolFormat) -> ParserConfig {
    let tool_names = TOOLS.iter().map(|name| (*name).to_owned()).collect();
    ParserConfig { tools: Some(tools), tool_names, ..ParserConfig::default() }
}

/// Reads an answer that comes in these parts.
fn pieces(config: &ParserConfig, parts: &[&str]) -> Vec<Piece> {
    let mut parser = AnswerParser::new(config);
    let mut pieces = Vec::new();
    for part in parts {
        parser.push(part, &mut pieces);
    }
    parser.finish(&mut pieces);
    let calls = pieces.iter().filter(|piece| matches!(piece, Piece::ToolCallStart { .. })).count();
    assert_eq!(parser.called_tools(), calls > 0);
    pieces
}

/// The pieces' contents, with calls put together. Indexes and ids are checked here.
fn parts(config: &ParserConfig, pieces: Vec<Piece>) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut calls = 0;
    for piece in pieces {
        match piece {
            Piece::Reasoning(text) => parts.push(Part::Reasoning(text)),
            Piece::Text(text) => parts.push(Part::Text(text)),
            Piece::ToolCallStart { index, id, name } => {
                assert_eq!(index, calls);
                let (prefix, length) =
                    if config.tools == Some(ToolFormat::Mistral) { ("", 9) } else { ("call_", 29) };
                assert!(id.starts_with(prefix) && id.len() == length, "{id}");
                assert!(id[prefix.len()..].chars().all(|c| c.is_ascii_alphanumeric()), "{id}");
                calls += 1;
                parts.push(Part::Call(name, String::new()));
            }
            Piece::ToolCallArguments { index, fragment } => match parts.last_mut() {
                Some(Part::Call(_, arguments)) => {
                    assert_eq!(index + 1, calls);
                    arguments.push_str(&fragment);
                }
                other => panic!("arguments {fragment:?} behind {other:?}"),
            },
        }
    }
    parts
}

/// Reads an answer whole, by the character, and in two and three parts cut everywhere; all must agree.
fn read(config: &ParserConfig, answer: &str) -> Vec<Part> {
    let whole = parts(config, pieces(config, &[answer]));
    let same = |cut: &[&str]| assert_eq!(parts(config, pieces(config, cut)), whole, "cut as {cut:?}");
    let bounds: Vec<usize> = answer.char_indices().map(|(at, _)| at).collect();
    let single: Vec<&str> = answer.split("").filter(|part| !part.is_empty()).collect();
    same(&single);
    for (n, &first) in bounds.iter().enumerate() {
        same(&[&answer[..first], &answer[first..]]);
        for &second in bounds[n..].iter().step_by(7) {
            same(&[&answer[..first], &answer[first..second], &answer[second..]]);
        }
    }
    whole
}

/// What came out after this much of an answer, before its end.
fn so_far(config: &ParserConfig, answer: &str) -> Vec<Part> {
    let mut parser = AnswerParser::new(config);
    let mut pieces = Vec::new();
    parser.push(answer, &mut pieces);
    parts(config, pieces)
}
