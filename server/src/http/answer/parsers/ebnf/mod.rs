//! Grammars in EBNF (GBNF), as llama.cpp and vLLM's `guided_grammar` take them, in llguidance's dialect of Lark.
//!
//! EBNF is defined over characters, Lark over lexemes: a lexer takes the longest lexeme that matches and never goes
//! back. A translation has to choose lexemes for which that makes no difference, and large ones, because every lexeme
//! costs the parser work. So:
//!
//! 1. `read`: text to expressions; `simplify`: a rule that only repeats itself at its beginning or end becomes a loop;
//! 2. a grammar without further recursion is one lexeme, a regular expression: exact and fastest;
//! 3. of any other grammar, the largest parts without recursion become lexemes (`shape`), and wherever taking the longest
//!    match could lose a sentence (`overlap`), they are taken apart until it cannot;
//! 4. `write`: rules and lexemes as Lark.

mod automaton;
mod charset;
mod overlap;
mod read;
mod shape;
mod simplify;
mod write;

use charset::CharSet;

/// Larger grammars are refused.
const LONGEST: usize = 128 * 1024;
/// Brackets within brackets. llguidance reads at most 30.
const DEEPEST: usize = 24;
/// Rules that refer to rules; llguidance follows them by recursion.
const LONGEST_CHAIN: usize = 128;
/// The most repetitions that `{m,n}` may ask for.
const MOST_REPETITIONS: u32 = 2000;

/// A part of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Expr {
    /// One character of these.
    Chars(CharSet),
    /// All of these in order; none is the empty text.
    Seq(Vec<Expr>),
    /// Any of these.
    Alt(Vec<Expr>),
    /// At least so often, at most so often.
    Repeat(Box<Expr>, u32, Option<u32>),
    /// The rule at this position.
    Rule(usize),
}

impl Expr {
    fn empty() -> Self {
        Self::Seq(Vec::new())
    }

    /// Several expressions in order, without a needless level for one.
    fn seq(mut items: Vec<Self>) -> Self {
        if items.len() == 1 { items.remove(0) } else { Self::Seq(items) }
    }

    /// Any of several, without a needless level for one.
    fn alt(mut items: Vec<Self>) -> Self {
        if items.len() == 1 { items.remove(0) } else { Self::Alt(items) }
    }

    /// Calls `f` with each rule that is referred to, in order.
    fn each_rule(&self, f: &mut dyn FnMut(usize)) {
        match self {
            Self::Chars(_) => {}
            Self::Seq(items) | Self::Alt(items) => items.iter().for_each(|item| item.each_rule(f)),
            Self::Repeat(item, ..) => item.each_rule(f),
            Self::Rule(rule) => f(*rule),
        }
    }

    fn refers_to(&self, rule: usize) -> bool {
        let mut found = false;
        self.each_rule(&mut |other| found |= other == rule);
        found
    }
}

/// A named rule.
#[derive(Debug, Clone)]
struct Rule {
    name: String,
    body: Expr,
}

/// A grammar of either kind as Lark, for fields that take both (`structured_outputs.grammar`, `guided_grammar`). As in
/// vLLM, one with `::=` is EBNF, which Lark has no such sign in; any other is passed on as it is.
///
/// # Errors
/// Those of a grammar in EBNF that is malformed or too large.
pub fn lark_from_grammar(grammar: &str) -> Result<String, String> {
    if grammar.contains("::=") { lark_from_ebnf(grammar) } else { Ok(grammar.to_owned()) }
}

/// Translates a grammar in EBNF, which begins at its rule `root`.
///
/// The result accepts the same texts, to the character. Of llama.cpp's GBNF, all is read but token literals
/// (`<name>`, `<[7]>`).
///
/// # Errors
/// In words with the line, when the text is no such grammar or is larger than what is read (128 KiB, 24 brackets within
/// brackets, 128 rules that refer to each other in a row, 2000 repetitions).
pub(super) fn lark_from_ebnf(grammar: &str) -> Result<String, String> {
    if grammar.len() > LONGEST {
        return Err(format!("the grammar has {} bytes; at most {LONGEST} are read", grammar.len()));
    }
    let (mut rules, root) = read::read(grammar)?;
    simplify::unroll(&mut rules);
    check_chains(&rules, root)?;
    let regular = shape::regular(&rules);
    let shape = shape::Shape::settle(&rules, &regular, root)?;
    Ok(write::write(&rules, &shape, root))
}

/// Refuses rules that refer to each other so deeply that following them could exhaust a stack.
fn check_chains(rules: &[Rule], root: usize) -> Result<(), String> {
    fn visit(rules: &[Rule], rule: usize, depth: usize, seen: &mut [bool]) -> Result<(), String> {
        if std::mem::replace(&mut seen[rule], true) {
            return Ok(());
        }
        if depth > LONGEST_CHAIN {
            return Err(format!(
                "more than {LONGEST_CHAIN} rules refer to each other in a row, up to {:?}",
                rules[rule].name
            ));
        }
        let mut next = Vec::new();
        rules[rule].body.each_rule(&mut |other| next.push(other));
        next.into_iter().try_for_each(|other| visit(rules, other, depth + 1, seen))
    }
    visit(rules, root, 0, &mut vec![false; rules.len()])
}
