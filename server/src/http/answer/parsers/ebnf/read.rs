//! Reads the text of a grammar in EBNF.

use std::{collections::HashMap, iter::Peekable, str::Chars};

use super::{CharSet, DEEPEST, Expr, MOST_REPETITIONS, Rule};

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Name(String),
    Is,
    Text(String),
    Set(CharSet),
    Open,
    Close,
    Or,
    Times(u32, Option<u32>),
}

/// Rules and the position of `root`.
pub(super) fn read(text: &str) -> Result<(Vec<Rule>, usize), String> {
    let tokens = Lexer { chars: text.chars().peekable(), line: 1 }.tokens()?;
    let mut reader = Reader { tokens, at: 0, numbers: HashMap::new(), rules: Vec::new() };
    while reader.at < reader.tokens.len() {
        reader.rule()?;
    }
    let mut rules = Vec::with_capacity(reader.rules.len());
    for (name, body, line) in reader.rules {
        let body = body.ok_or_else(|| format!("line {line}: there is no rule named {name:?}"))?;
        rules.push(Rule { name, body });
    }
    let root =
        reader.numbers.get("root").ok_or("the grammar has no rule named \"root\", where it would begin")?;
    Ok((rules, *root))
}

struct Lexer<'a> {
    chars: Peekable<Chars<'a>>,
    line: usize,
}

impl Lexer<'_> {
    fn tokens(mut self) -> Result<Vec<(Token, usize)>, String> {
        let mut tokens = Vec::new();
        while let Some(c) = self.chars.next() {
            let line = self.line;
            let token = match c {
                '\n' => {
                    self.line += 1;
                    continue;
                }
                ' ' | '\t' | '\r' => continue,
                '#' => {
                    while self.chars.next_if(|c| *c != '\n').is_some() {}
                    continue;
                }
                '(' => Token::Open,
                ')' => Token::Close,
                '|' => Token::Or,
                '.' => Token::Set(CharSet::any()),
                '*' => Token::Times(0, None),
                '+' => Token::Times(1, None),
                '?' => Token::Times(0, Some(1)),
                '"' => Token::Text(self.text()?),
                '[' => Token::Set(self.set()?),
                '{' => self.times()?,
                ':' if self.chars.next() == Some(':') && self.chars.next() == Some('=') => Token::Is,
                'a'..='z' | 'A'..='Z' | '0'..='9' | '_' => Token::Name(self.name(c)),
                '<' | '!' => {
                    return self
                        .error("tokens such as <name> are not supported: write the text itself in quotes");
                }
                _ => return self.error(&format!("{c:?} has no meaning here")),
            };
            tokens.push((token, line));
        }
        Ok(tokens)
    }

    fn error<T>(&self, message: &str) -> Result<T, String> {
        Err(format!("line {}: {message}", self.line))
    }

    fn name(&mut self, first: char) -> String {
        let mut name = String::from(first);
        while let Some(c) = self.chars.next_if(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-')) {
            name.push(c);
        }
        name
    }

    fn text(&mut self) -> Result<String, String> {
        let mut text = String::new();
        loop {
            match self.chars.next() {
                Some('"') => return Ok(text),
                Some('\\') => text.push(self.escape()?),
                Some('\n') | None => return self.error("a text in quotes does not end on its line"),
                Some(c) => text.push(c),
            }
        }
    }

    /// The rest of `[…]`.
    fn set(&mut self) -> Result<CharSet, String> {
        let negated = self.chars.next_if_eq(&'^').is_some();
        let mut ranges = Vec::new();
        loop {
            let Some(c) = self.chars.next().filter(|c| *c != '\n') else {
                return self.error("a set in brackets does not end on its line");
            };
            let first = match c {
                ']' => break,
                '\\' => self.escape()?,
                c => c,
            };
            let mut last = first;
            let mut ahead = self.chars.clone();
            if ahead.next() == Some('-') && ahead.next().is_some_and(|c| c != ']') {
                self.chars.next();
                last = match self.chars.next() {
                    Some('\\') => self.escape()?,
                    Some(c) => c,
                    None => first,
                };
            }
            if last < first {
                return self.error(&format!("the range {first:?} to {last:?} is the wrong way round"));
            }
            ranges.push((u32::from(first), u32::from(last)));
        }
        let set = CharSet::new(ranges);
        let set = if negated { set.negated() } else { set };
        if set.is_empty() { self.error("a set in brackets has no characters") } else { Ok(set) }
    }

    fn escape(&mut self) -> Result<char, String> {
        let digits = match self.chars.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(c) if c.is_ascii_punctuation() => return Ok(c),
            other => {
                let other = other.map_or_else(|| "the end".to_owned(), |c| format!("{c:?}"));
                return self.error(&format!("{other} after a backslash has no meaning"));
            }
        };
        let code = (0..digits).try_fold(0u32, |code, _| {
            let digit = self.chars.next().and_then(|c| c.to_digit(16))?;
            code.checked_mul(16)?.checked_add(digit)
        });
        match code.and_then(char::from_u32) {
            Some(c) => Ok(c),
            None => self.error(&format!("an escape of {digits} hexadecimal digits names no character")),
        }
    }

    /// The rest of `{m}`, `{m,}`, `{,n}` or `{m,n}`.
    fn times(&mut self) -> Result<Token, String> {
        let mut inner = String::new();
        while let Some(c) = self.chars.next_if(|c| c.is_ascii_digit() || matches!(c, ',' | ' ')) {
            inner.push(c);
        }
        let end = self.chars.next();
        let number = |text: &str| text.trim().parse::<u32>().ok();
        let bounds = match inner.split_once(',') {
            _ if end != Some('}') => None,
            None => number(&inner).map(|times| (times, Some(times))),
            Some((least, "")) => number(least).map(|least| (least, None)),
            Some((least, most)) => {
                let least = if least.trim().is_empty() { Some(0) } else { number(least) };
                least.zip(number(most)).map(|(least, most)| (least, Some(most)))
            }
        };
        match bounds {
            Some((least, most)) if most.unwrap_or(least) > MOST_REPETITIONS => {
                self.error(&format!("at most {MOST_REPETITIONS} repetitions are supported"))
            }
            Some((least, most)) if most.is_none_or(|most| least <= most) => Ok(Token::Times(least, most)),
            _ => self.error("repetitions are written {m}, {m,}, {,n} or {m,n}"),
        }
    }
}

struct Reader {
    tokens: Vec<(Token, usize)>,
    at: usize,
    numbers: HashMap<String, usize>,
    /// Name, body where it was read already, line where it was named first.
    rules: Vec<(String, Option<Expr>, usize)>,
}

impl Reader {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    fn line(&self) -> usize {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(_, line)| *line)
    }

    fn error<T>(&self, message: &str) -> Result<T, String> {
        Err(format!("line {}: {message}", self.line()))
    }

    /// The next rule begins here, which ends the one before it wherever its lines end.
    fn at_rule(&self) -> bool {
        matches!(self.tokens.get(self.at..self.at + 2), Some([(Token::Name(_), _), (Token::Is, _)]))
    }

    fn number(&mut self, name: &str) -> usize {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        self.rules.push((name.to_owned(), None, self.line()));
        self.numbers.insert(name.to_owned(), self.rules.len() - 1);
        self.rules.len() - 1
    }

    fn rule(&mut self) -> Result<(), String> {
        let name = match self.peek() {
            Some(Token::Name(name)) if self.at_rule() => name.clone(),
            _ => return self.error("a rule is expected here: name ::= ..."),
        };
        let number = self.number(&name);
        if self.rules[number].1.is_some() {
            return self.error(&format!("there are two rules named {name:?}"));
        }
        self.at += 2;
        let body = self.alternatives(0)?;
        self.rules[number].1 = Some(body);
        Ok(())
    }

    fn alternatives(&mut self, depth: usize) -> Result<Expr, String> {
        if depth > DEEPEST {
            return self.error(&format!("more than {DEEPEST} brackets within brackets"));
        }
        let mut all = vec![self.sequence(depth)?];
        while self.peek() == Some(&Token::Or) {
            self.at += 1;
            all.push(self.sequence(depth)?);
        }
        Ok(Expr::alt(all))
    }

    fn sequence(&mut self, depth: usize) -> Result<Expr, String> {
        let mut items = Vec::new();
        while !self.at_rule() {
            let item = match self.peek().cloned() {
                Some(Token::Name(name)) => Expr::Rule(self.number(&name)),
                Some(Token::Text(text)) => {
                    Expr::seq(text.chars().map(|c| Expr::Chars(CharSet::single(c))).collect())
                }
                Some(Token::Set(set)) => Expr::Chars(set),
                Some(Token::Open) => {
                    self.at += 1;
                    let group = self.alternatives(depth + 1)?;
                    if self.peek() != Some(&Token::Close) {
                        return self.error("a bracket is not closed");
                    }
                    group
                }
                Some(Token::Times(..)) => return self.error("there is nothing to repeat here"),
                Some(Token::Is) => return self.error("\"::=\" belongs behind a rule's name"),
                Some(Token::Close) if depth == 0 => {
                    return self.error("a bracket closes that was not opened");
                }
                Some(Token::Close | Token::Or) | None => break,
            };
            self.at += 1;
            items.push(self.repeated(item)?);
        }
        Ok(Expr::seq(items))
    }

    fn repeated(&mut self, item: Expr) -> Result<Expr, String> {
        let Some(&Token::Times(least, most)) = self.peek() else { return Ok(item) };
        self.at += 1;
        if matches!(self.peek(), Some(Token::Times(..))) {
            return self.error("two repetitions in a row: put brackets around the first");
        }
        Ok(match (least, most) {
            (_, Some(0)) => Expr::empty(),
            (1, Some(1)) => item,
            _ => Expr::Repeat(Box::new(item), least, most),
        })
    }
}
