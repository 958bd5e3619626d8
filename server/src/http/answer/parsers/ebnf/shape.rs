//! Which parts of a grammar are lexemes and which are rules.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{Expr, Rule, overlap::Overlaps};

/// A part of a rule in terms of lexemes.
#[derive(Debug, Clone)]
pub(super) enum Node {
    /// The lexeme at this position of [`Shape::lexemes`].
    Lexeme(usize),
    Rule(usize),
    Seq(Vec<Node>),
    Alt(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

/// Rules over lexemes.
#[derive(Debug, Default)]
pub(super) struct Shape {
    /// Regular expressions; rules within them are regular too.
    pub lexemes: Vec<Expr>,
    /// The rules that are written as rules, by position.
    pub rules: BTreeMap<usize, Node>,
    known: HashMap<Expr, usize>,
}

/// For each rule, whether it comes without recursion.
pub(super) fn regular(rules: &[Rule]) -> Vec<bool> {
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); rules.len()];
    let mut open = vec![0_usize; rules.len()];
    for (number, rule) in rules.iter().enumerate() {
        rule.body.each_rule(&mut |other| {
            users[other].push(number);
            open[number] += 1;
        });
    }
    let mut done: Vec<usize> = (0..rules.len()).filter(|number| open[*number] == 0).collect();
    let mut regular = vec![false; rules.len()];
    while let Some(number) = done.pop() {
        regular[number] = true;
        for user in &users[number] {
            open[*user] -= 1;
            if open[*user] == 0 {
                done.push(*user);
            }
        }
    }
    regular
}

impl Shape {
    /// The largest lexemes for which taking the longest match loses no sentence.
    pub fn settle(rules: &[Rule], regular: &[bool], root: usize) -> Result<Self, String> {
        let mut shape = Self::default();
        let mut wanted = vec![root];
        while let Some(number) = wanted.pop() {
            if !shape.rules.contains_key(&number) {
                let node = shape.convert(&rules[number].body, regular, &mut wanted);
                shape.rules.insert(number, node);
            }
        }
        if regular[root] {
            return Ok(shape);
        }
        let mut overlaps = Overlaps::default();
        loop {
            let split = overlaps.find(rules, &shape, root)?;
            if split.is_empty() {
                return Ok(shape);
            }
            shape.split(&split, rules);
        }
    }

    fn lexeme(&mut self, expr: &Expr) -> Node {
        if is_void(expr) {
            return Node::Seq(Vec::new());
        }
        let next = self.lexemes.len();
        let number = *self.known.entry(expr.clone()).or_insert(next);
        if number == next {
            self.lexemes.push(expr.clone());
        }
        Node::Lexeme(number)
    }

    /// Makes everything a lexeme that can be one.
    fn convert(&mut self, expr: &Expr, regular: &[bool], wanted: &mut Vec<usize>) -> Node {
        if is_regular(expr, regular) {
            return self.lexeme(expr);
        }
        match expr {
            Expr::Rule(number) => {
                wanted.push(*number);
                Node::Rule(*number)
            }
            Expr::Repeat(item, least, most) => {
                Node::Repeat(Box::new(self.convert(item, regular, wanted)), *least, *most)
            }
            Expr::Alt(items) => {
                let (plain, others): (Vec<&Expr>, Vec<&Expr>) =
                    items.iter().partition(|item| is_regular(item, regular));
                let mut nodes: Vec<Node> =
                    others.into_iter().map(|item| self.convert(item, regular, wanted)).collect();
                if !plain.is_empty() {
                    nodes.push(self.lexeme(&Expr::alt(plain.into_iter().cloned().collect())));
                }
                Node::Alt(nodes)
            }
            Expr::Seq(_) => {
                let (mut nodes, mut run) = (Vec::new(), Vec::new());
                for item in flat(expr) {
                    if is_regular(item, regular) {
                        run.push(item.clone());
                        continue;
                    }
                    if !run.is_empty() {
                        nodes.push(self.lexeme(&Expr::seq(std::mem::take(&mut run))));
                    }
                    nodes.push(self.convert(item, regular, wanted));
                }
                if !run.is_empty() {
                    nodes.push(self.lexeme(&Expr::seq(run)));
                }
                Node::Seq(nodes)
            }
            // Regular, and therefore a lexeme above.
            Expr::Chars(_) => self.lexeme(expr),
        }
    }

    /// Takes lexemes apart by one level.
    fn split(&mut self, lexemes: &HashSet<usize>, rules: &[Rule]) {
        let mut parts: HashMap<usize, Node> = HashMap::new();
        for &number in lexemes {
            let node = match self.lexemes[number].clone() {
                Expr::Rule(rule) => {
                    if !self.rules.contains_key(&rule) {
                        let body = self.lexeme(&rules[rule].body);
                        self.rules.insert(rule, body);
                    }
                    Node::Rule(rule)
                }
                Expr::Alt(items) => Node::Alt(items.iter().map(|item| self.lexeme(item)).collect()),
                Expr::Repeat(item, least, most) => Node::Repeat(Box::new(self.lexeme(&item)), least, most),
                expr => Node::Seq(flat(&expr).into_iter().map(|item| self.lexeme(item)).collect()),
            };
            parts.insert(number, node);
        }
        for node in self.rules.values_mut() {
            replace(node, &parts);
        }
    }
}

fn replace(node: &mut Node, parts: &HashMap<usize, Node>) {
    match node {
        Node::Lexeme(number) => {
            if let Some(part) = parts.get(number) {
                *node = part.clone();
            }
        }
        Node::Rule(_) => {}
        Node::Seq(items) | Node::Alt(items) => items.iter_mut().for_each(|item| replace(item, parts)),
        Node::Repeat(item, ..) => replace(item, parts),
    }
}

fn is_regular(expr: &Expr, regular: &[bool]) -> bool {
    let mut all = true;
    expr.each_rule(&mut |rule| all &= regular[rule]);
    all
}

/// Whether an expression is the empty text and nothing else, whatever it looks like.
fn is_void(expr: &Expr) -> bool {
    match expr {
        Expr::Seq(items) | Expr::Alt(items) => items.iter().all(is_void),
        Expr::Repeat(item, ..) => is_void(item),
        Expr::Chars(_) | Expr::Rule(_) => false,
    }
}

/// The items of a sequence, with sequences within it opened.
fn flat(expr: &Expr) -> Vec<&Expr> {
    match expr {
        Expr::Seq(items) => items.iter().flat_map(flat).collect(),
        other => vec![other],
    }
}
