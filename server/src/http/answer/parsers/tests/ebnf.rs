//! EBNF: the translation accepts the same texts.

use proptest::prelude::*;

use super::{super::ebnf::lark_from_ebnf, grammars::Checker, *};

/// Every text has to be accepted or refused by the translation as given here.
fn check(ebnf: &str, good: &[&str], bad: &[&str]) {
    let lark = lark_from_grammar(ebnf).unwrap();
    let checker = Checker::new(&lark);
    for text in good {
        assert!(checker.accepts(text), "{text:?} belongs to\n{ebnf}\n{lark}");
    }
    for text in bad {
        assert!(!checker.accepts(text), "{text:?} does not belong to\n{ebnf}\n{lark}");
    }
}

#[test]
fn sql_as_in_vllms_manual() {
    check(
        r#"
root ::= select_statement
select_statement ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 " | "table_2 "
condition ::= column "= " number
number ::= "1 " | "2 "
"#,
        &["SELECT col_1  from table_2  where col_2 = 1 "],
        &["SELECT col_3  from table_2  where col_2 = 1 ", "SELECT col_1  from table_2 ", ""],
    );
}

#[test]
fn json_as_in_llama_cpp() {
    check(
        r##"
# JSON, whose spaces are written as recursion.
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [1-9] [0-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"##,
        &["{}", "{\"a\": [1, -2.5e7, {\"é\\u00e9\\n\": null}], \"b\":true}\n", "{\"a\":\n  \"x\"}"],
        &["{", "[]", "{\"a\": 01}", "{\"a\":  1}", "{'a': 1}", "{\"a\" 1}", "{\"a\": \"\n\"}", "{} {}"],
    );
}

#[test]
fn expressions_where_the_longest_match_is_wrong() {
    // White space at the end of a term takes newlines too, and a line ends with one.
    let arithmetic = r#"
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"#;
    check(
        arithmetic,
        &["1=1\n", "(a +b2)*3 = 7\n", "x=\n y \n\nz=(1)\n", "((1))=1\n1=1\n"],
        &["1=1", "1+=1\n", "(1=1\n", "2a=1\n"],
    );
    check(
        "root ::= \"(\" root \")\" | [a-z]+ \"x\"",
        &["ax", "((xx))", "(xax)"],
        &["x", "(a)", "((ax)", "a"],
    );
    check(
        "root ::= \"a\" root \"b\" | \"ab\" \"c\"? | \"\"",
        &["", "ab", "abc", "aabcb", "aabb"],
        &["abcb", "aab", "c"],
    );
    check(
        "root ::= a root | b\na ::= \"if\" | [a-z]\nb ::= \"if \" root \"!\" | \"i\"",
        &["i", "ifi", "if i!", "fifif ii!"],
        &["if", "if i", "if i!!"],
    );
}

#[test]
fn recursion_that_is_a_loop() {
    check("root ::= \"a\" root | \"b\"", &["b", "aaab"], &["", "a", "abb"]);
    check("root ::= root \"+\" n | n\nn ::= [0-9]+", &["1", "12+3+4"], &["+1", "1+", "1++2"]);
    check("root ::= (\"a\" root)?", &["", "aaa"], &["b"]);
    check("root ::= \"a\" root \"b\" | \"\"", &["", "ab", "aaabbb"], &["a", "aab", "ba"]);
}

#[test]
fn signs_and_escapes() {
    check(
        r#"root ::= [a-c\]\-\\] "\x41\u00e9\U0001F600\"\n" [^\n\]]"#,
        &["]Aé😀\"\nx", "-Aé😀\"\nü"],
        &["dAé😀\"\nx", "aAé😀\"\n\n"],
    );
    check(
        "root ::= \"a\"{2} \"b\"{1,} \"c\"{,2} \"d\"{1,2} \"e\"{0}",
        &["aabd", "aabbbccdd"],
        &["abd", "aabcccd", "aad", "aabde"],
    );
    check("root ::= . \"\" [-x] [x-] [+--]", &["é-x,", "\n--+"], &["-x,", "a-y,"]);
    check(
        "root ::= my-Rule_2 \"/\" |\n  # comment \"::=\"\n  ( \"y\"\n )\nmy-Rule_2 ::= \"\\\\d\"\n",
        &["\\d/", "y"],
        &["1/", "\\d"],
    );
    check("root::=(\"a\"|(\"b\")+)* \"\u{7f}\"", &["abba\u{7f}"], &["abba"]);
}

#[test]
fn what_is_no_grammar_is_refused_with_its_line() {
    for (ebnf, message) in [
        ("start ::= \"a\"", "no rule named \"root\""),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2: there are two rules named \"root\""),
        ("root ::= \"a\"\n\nother ::= nobody", "line 3: there is no rule named \"nobody\""),
        ("root ::= \"a", "line 1: a text in quotes does not end"),
        ("root ::= [a", "a set in brackets does not end"),
        ("root ::= []", "has no characters"),
        ("root ::= [z-a]", "wrong way round"),
        ("root ::= (\"a\"", "a bracket is not closed"),
        ("root ::= \"a\")", "was not opened"),
        ("root ::= *", "nothing to repeat"),
        ("root ::= \"a\"**", "two repetitions"),
        ("root ::= \"a\"{3,2}", "repetitions are written"),
        ("root ::= \"a\"{99999}", "at most 2000"),
        ("root ::= \"\\q\"", "after a backslash"),
        ("root ::= \"\\ud800\"", "names no character"),
        ("root ::= <think>", "write the text itself"),
        ("root ::= $", "has no meaning"),
        ("root ::= \"a\" ::= \"b\"", "belongs behind a rule's name"),
        ("\"a\"", "a rule is expected"),
    ] {
        let error = lark_from_ebnf(ebnf).unwrap_err();
        assert!(error.contains(message), "{ebnf}: {error}");
    }
    assert_eq!(lark_from_grammar("start: \"a\"").unwrap(), "start: \"a\"");
}

#[test]
fn large_and_hostile_grammars_end_soon() {
    let started = std::time::Instant::now();
    assert!(lark_from_ebnf(&"x".repeat(200_000)).unwrap_err().contains("bytes"));
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(5000), ")".repeat(5000));
    assert!(lark_from_ebnf(&deep).unwrap_err().contains("24 brackets"));
    let chain: String = (0..5000).map(|n| format!("r{n} ::= \"a\" r{} \"b\"\n", n + 1)).collect();
    assert!(
        lark_from_ebnf(&format!("root ::= r0\n{chain}r5000 ::= \"c\"")).unwrap_err().contains("in a row")
    );
    // Each rule twice the one before: 2^100 characters if it were written out.
    let double: String = (0..100).map(|n| format!("r{n} ::= r{} r{}\n", n + 1, n + 1)).collect();
    lark_from_ebnf(&format!("root ::= r0\n{double}r100 ::= \"c\"")).unwrap();
    let recursive = format!("root ::= \"(\" root \")\" | r0\n{double}r100 ::= \"c\"");
    lark_from_ebnf(&recursive).unwrap();
    let many: String = (0..3000).map(|n| format!(" | r{n}")).collect();
    let many_rules: String = (0..3000).map(|n| format!("r{n} ::= \"{n}(\" root \")\"\n")).collect();
    let error = lark_from_ebnf(&format!("root ::= \"x\" {many}\n{many_rules}")).unwrap_err();
    assert!(error.contains("too many parts"), "{error}");
    let entangled: String =
        (0..900).map(|n| format!("\"(\" root \")\" [a-z]{{{n}}} | ", n = n % 7)).collect();
    let _ = lark_from_ebnf(&format!("root ::= {entangled} \"x\""));
    let seconds = started.elapsed().as_secs_f64();
    assert!(seconds < 30.0, "{seconds} s");
}

/// A grammar made at random, with letters `a` and `b`, and rules 0 (`root`) to 2.
#[derive(Debug, Clone)]
enum Made {
    Text(&'static str),
    Rule(usize),
    Seq(Vec<Made>),
    Alt(Vec<Made>),
    Repeat(Box<Made>, usize, usize),
}

impl Made {
    fn ebnf(&self) -> String {
        let list = |items: &[Self], separator: &str| {
            let items: Vec<String> = items.iter().map(Self::ebnf).collect();
            format!("({})", items.join(separator))
        };
        match self {
            Self::Text(text) => (*text).to_owned(),
            Self::Rule(0) => "root".to_owned(),
            Self::Rule(rule) => format!("r{rule}"),
            Self::Seq(items) => list(items, " "),
            Self::Alt(items) => list(items, " | "),
            Self::Repeat(item, least, most) if *most >= MANY => format!("({}){{{least},}}", item.ebnf()),
            Self::Repeat(item, least, most) => format!("({}){{{least},{most}}}", item.ebnf()),
        }
    }

    /// The places of a text at which a match that begins at `from` may end, as bits, by definition.
    fn ends(&self, text: &[u8], from: usize, rules: &[Vec<u32>]) -> u32 {
        let each = |starts: u32, item: &Self| {
            (0..=text.len())
                .filter(|at| starts >> at & 1 == 1)
                .fold(0, |ends, at| ends | item.ends(text, at, rules))
        };
        match self {
            Self::Text(set) => {
                let inner = set.trim_matches(['"', '[', ']']).as_bytes();
                let whole = set.starts_with('"');
                let length = if whole { inner.len() } else { 1 };
                let found = text[from..]
                    .get(..length)
                    .is_some_and(|part| if whole { part == inner } else { inner.contains(&part[0]) });
                u32::from(found) << (from + length)
            }
            Self::Rule(rule) => rules[*rule][from],
            Self::Seq(items) => items.iter().fold(1 << from, each),
            Self::Alt(items) => items.iter().fold(0, |ends, item| ends | item.ends(text, from, rules)),
            Self::Repeat(item, least, most) => {
                let (mut starts, mut ends) = (1_u32 << from, 0);
                for times in 0..=*most {
                    ends |= if times >= *least { starts } else { 0 };
                    starts = each(starts, item);
                }
                ends
            }
        }
    }
}

/// Repetitions that no short text exhausts.
const MANY: usize = 9;

/// Whether a text belongs to rule 0: the smallest solution of the rules' equations.
fn belongs(made: &[Made], text: &str) -> bool {
    let text = text.as_bytes();
    let mut known = vec![vec![0_u32; text.len() + 1]; made.len()];
    loop {
        let next: Vec<Vec<u32>> = made
            .iter()
            .map(|rule| (0..=text.len()).map(|from| rule.ends(text, from, &known)).collect())
            .collect();
        if next == known {
            return known[0][0] >> text.len() & 1 == 1;
        }
        known = next;
    }
}

fn made() -> impl Strategy<Value = Made> {
    let leaf = prop_oneof![
        4 => prop::sample::select(vec!["\"a\"", "\"b\"", "\"ab\"", "\"ba\"", "\"aa\"", "[ab]", "\"\""]).prop_map(Made::Text),
        3 => (0..3_usize).prop_map(Made::Rule),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            3 => prop::collection::vec(inner.clone(), 1..4).prop_map(Made::Seq),
            3 => prop::collection::vec(inner.clone(), 1..4).prop_map(Made::Alt),
            1 => (inner, prop::sample::select(vec![(0, MANY), (1, MANY), (0, 1), (1, 2), (2, 3)]))
                .prop_map(|(item, (least, most))| Made::Repeat(Box::new(item), least, most)),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_translation_accepts_exactly_the_same_texts(made in prop::collection::vec(made(), 3)) {
        // A way out of every rule, so that each has at least one text.
        let rules: Vec<Made> =
            made.into_iter().map(|body| Made::Alt(vec![body, Made::Text("\"b\"")])).collect();
        let ebnf: String = rules
            .iter()
            .enumerate()
            .map(|(number, body)| format!("{} ::= {}\n", Made::Rule(number).ebnf(), body.ebnf()))
            .collect();
        let lark = lark_from_ebnf(&ebnf).unwrap();
        let checker = Checker::new(&lark);
        for length in 0..6 {
            for bits in 0..1_u32 << length {
                let text: String = (0..length).map(|at| if bits >> at & 1 == 1 { 'b' } else { 'a' }).collect();
                prop_assert_eq!(checker.accepts(&text), belongs(&rules, &text), "{:?} in\n{}\n{}", text, ebnf, lark);
            }
        }
    }
}

const CASES: u32 = 300;
