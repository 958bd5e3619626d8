//! Writes rules and lexemes as Lark.

use std::collections::BTreeSet;

use super::{
    super::grammar::literal,
    CharSet, Expr, Rule,
    shape::{Node, Shape},
};

/// The grammar's text. Names carry the rule's position, since Lark's names have fewer letters than EBNF's.
pub(super) fn write(rules: &[Rule], shape: &Shape, root: usize) -> String {
    let mut lark = format!("start: {}\n", rule_name(rules, root));
    let (mut lexemes, mut tokens) = (BTreeSet::new(), BTreeSet::new());
    for (number, node) in &shape.rules {
        let mut body = String::new();
        write_node(node, Level::Alt, &mut body, &mut |name, text| match name {
            Reference::Rule(rule) => text.push_str(&rule_name(rules, rule)),
            Reference::Lexeme(lexeme) => {
                lexemes.insert(lexeme);
                text.push_str(&format!("L{lexeme}"));
            }
        });
        lark.push_str(&format!("{}: {body}\n", rule_name(rules, *number)));
    }
    let mut open = Vec::new();
    for lexeme in lexemes {
        let mut body = String::new();
        write_expr(&shape.lexemes[lexeme], Level::Alt, &mut body, &mut |rule, text| {
            open.push(rule);
            text.push_str(&token_name(rules, rule));
        });
        lark.push_str(&format!("L{lexeme}: {body}\n"));
    }
    while let Some(rule) = open.pop() {
        if tokens.insert(rule) {
            let mut body = String::new();
            write_expr(&rules[rule].body, Level::Alt, &mut body, &mut |other, text| {
                open.push(other);
                text.push_str(&token_name(rules, other));
            });
            lark.push_str(&format!("{}: {body}\n", token_name(rules, rule)));
        }
    }
    lark
}

fn rule_name(rules: &[Rule], rule: usize) -> String {
    format!("r{rule}_{}", rules[rule].name.replace('-', "_").to_ascii_lowercase())
}

fn token_name(rules: &[Rule], rule: usize) -> String {
    format!("R{rule}_{}", rules[rule].name.replace('-', "_").to_ascii_uppercase())
}

/// Where an expression stands, and so whether it needs brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Level {
    Alt,
    Seq,
    Item,
}

enum Reference {
    Rule(usize),
    Lexeme(usize),
}

/// Writes alternatives or a sequence, in brackets where it stands in something that binds tighter.
fn write_list<T>(
    items: &[T],
    (own, at): (Level, Level),
    text: &mut String,
    write_item: &mut dyn FnMut(&T, Level, &mut String),
) {
    let brackets = own < at;
    let (separator, inner) = if own == Level::Alt { (" | ", Level::Seq) } else { (" ", Level::Item) };
    text.push_str(if brackets { "(" } else { "" });
    for (n, item) in items.iter().enumerate() {
        text.push_str(if n > 0 { separator } else { "" });
        write_item(item, inner, text);
    }
    text.push_str(if brackets { ")" } else { "" });
}

fn write_times(least: u32, most: Option<u32>, text: &mut String) {
    text.push_str(&match (least, most) {
        (0, None) => "*".to_owned(),
        (1, None) => "+".to_owned(),
        (0, Some(1)) => "?".to_owned(),
        (least, None) => format!("{{{least},}}"),
        (least, Some(most)) => format!("{{{least},{most}}}"),
    });
}

fn write_node(node: &Node, at: Level, text: &mut String, name: &mut dyn FnMut(Reference, &mut String)) {
    match node {
        Node::Lexeme(lexeme) => name(Reference::Lexeme(*lexeme), text),
        Node::Rule(rule) => name(Reference::Rule(*rule), text),
        Node::Seq(items) if items.is_empty() => text.push_str("\"\""),
        Node::Seq(items) => {
            write_list(items, (Level::Seq, at), text, &mut |item, at, text| write_node(item, at, text, name));
        }
        Node::Alt(items) => {
            write_list(items, (Level::Alt, at), text, &mut |item, at, text| write_node(item, at, text, name));
        }
        Node::Repeat(item, least, most) => {
            // A repetition of a repetition needs brackets too.
            let bracket = matches!(**item, Node::Repeat(..));
            text.push_str(if bracket { "(" } else { "" });
            write_node(item, Level::Item, text, name);
            text.push_str(if bracket { ")" } else { "" });
            write_times(*least, *most, text);
        }
    }
}

fn write_expr(expr: &Expr, at: Level, text: &mut String, name: &mut dyn FnMut(usize, &mut String)) {
    match expr {
        Expr::Chars(set) => write_set(set, text),
        Expr::Rule(rule) => name(*rule, text),
        Expr::Seq(items) => match plain(items) {
            Some(plain) => text.push_str(&literal(&plain)),
            None => write_list(items, (Level::Seq, at), text, &mut |item, at, text| {
                write_expr(item, at, text, name)
            }),
        },
        Expr::Alt(items) => {
            write_list(items, (Level::Alt, at), text, &mut |item, at, text| write_expr(item, at, text, name));
        }
        Expr::Repeat(item, least, most) => {
            let bracket = matches!(**item, Expr::Repeat(..));
            text.push_str(if bracket { "(" } else { "" });
            write_expr(item, Level::Item, text, name);
            text.push_str(if bracket { ")" } else { "" });
            write_times(*least, *most, text);
        }
    }
}

/// The text that a sequence of single characters is.
fn plain(items: &[Expr]) -> Option<String> {
    items
        .iter()
        .map(|item| match item {
            Expr::Chars(set) => set.only(),
            _ => None,
        })
        .collect()
}

fn write_set(set: &CharSet, text: &mut String) {
    if let Some(c) = set.only() {
        return text.push_str(&literal(&c.to_string()));
    }
    text.push_str("/[");
    for (first, last) in set.ranges() {
        write_char(first, text);
        if first != last {
            text.push('-');
            write_char(last, text);
        }
    }
    text.push_str("]/");
}

fn write_char(c: char, text: &mut String) {
    if c.is_ascii_alphanumeric() {
        text.push(c);
    } else {
        text.push_str(&format!("\\u{{{:x}}}", u32::from(c)));
    }
}
