//! Which characters may follow each other within a lexeme (Glushkov's position automaton).

use super::{CharSet, Expr, Rule};

/// Lexemes with more positions or transitions are taken apart instead.
const MOST_POSITIONS: usize = 500;
const MOST_TRANSITIONS: usize = 20_000;

/// A lexeme as an automaton whose states are its characters' places. Counted repetitions are read as any number of them,
/// which only adds texts: what this says cannot happen, cannot.
#[derive(Debug, Default)]
pub(super) struct Automaton {
    pub sets: Vec<CharSet>,
    pub nullable: bool,
    /// Places where a text may begin.
    pub first: Vec<usize>,
    /// Whether a text may end at a place.
    pub last: Vec<bool>,
    /// Places that may come after a place.
    pub next: Vec<Vec<usize>>,
    transitions: usize,
}

#[derive(Default)]
struct Part {
    nullable: bool,
    first: Vec<usize>,
    last: Vec<usize>,
}

/// The lexeme is too large to look at.
struct TooLarge;

impl Automaton {
    /// `None` when the lexeme is too large to look at.
    pub fn new(expr: &Expr, rules: &[Rule]) -> Option<Self> {
        let mut automaton = Self::default();
        let part = automaton.build(expr, rules).ok()?;
        automaton.nullable = part.nullable;
        automaton.first = part.first;
        automaton.last = vec![false; automaton.sets.len()];
        part.last.iter().for_each(|place| automaton.last[*place] = true);
        Some(automaton)
    }

    /// Characters that a text may begin with.
    pub fn beginnings(&self) -> CharSet {
        let mut all = CharSet::default();
        self.first.iter().for_each(|place| all.add(&self.sets[*place]));
        all
    }

    fn join(&mut self, from: &[usize], to: &[usize]) -> Result<(), TooLarge> {
        self.transitions += from.len() * to.len();
        if self.transitions > MOST_TRANSITIONS {
            return Err(TooLarge);
        }
        from.iter().for_each(|place| self.next[*place].extend(to));
        Ok(())
    }

    fn build(&mut self, expr: &Expr, rules: &[Rule]) -> Result<Part, TooLarge> {
        match expr {
            Expr::Chars(set) => {
                if self.sets.len() >= MOST_POSITIONS {
                    return Err(TooLarge);
                }
                self.sets.push(set.clone());
                self.next.push(Vec::new());
                let place = vec![self.sets.len() - 1];
                Ok(Part { nullable: false, first: place.clone(), last: place })
            }
            Expr::Rule(number) => self.build(&rules[*number].body, rules),
            Expr::Alt(items) => {
                let mut whole = Part::default();
                for item in items {
                    let part = self.build(item, rules)?;
                    whole.nullable |= part.nullable;
                    whole.first.extend(part.first);
                    whole.last.extend(part.last);
                }
                Ok(whole)
            }
            Expr::Seq(items) => {
                let mut whole = Part { nullable: true, ..Part::default() };
                for item in items {
                    let part = self.build(item, rules)?;
                    self.join(&whole.last, &part.first)?;
                    if whole.nullable {
                        whole.first.extend(&part.first);
                    }
                    if !part.nullable {
                        whole.last.clear();
                    }
                    whole.last.extend(part.last);
                    whole.nullable &= part.nullable;
                }
                Ok(whole)
            }
            Expr::Repeat(item, least, most) => {
                let mut part = self.build(item, rules)?;
                if most.is_none_or(|most| most > 1) {
                    self.join(&part.last, &part.first)?;
                }
                part.nullable |= *least == 0;
                Ok(part)
            }
        }
    }

    /// Characters with which a text of this automaton can go on where one of `shorter` ends, or `None` when finding
    /// them takes too long.
    pub fn beyond(&self, shorter: &Self) -> Option<CharSet> {
        let mut beyond = CharSet::default();
        let mut open = Vec::new();
        let mut seen = vec![false; self.sets.len() * shorter.sets.len()];
        let mut steps = 0;
        let mut reach = |mine: &[usize], theirs: &[usize], open: &mut Vec<(usize, usize)>| {
            steps += mine.len() * theirs.len();
            for &a in mine {
                for &b in theirs {
                    let pair = a * shorter.sets.len() + b;
                    if !seen[pair] && self.sets[a].meets(&shorter.sets[b]) {
                        seen[pair] = true;
                        open.push((a, b));
                    }
                }
            }
            steps < 400_000
        };
        if !reach(&self.first, &shorter.first, &mut open) {
            return None;
        }
        while let Some((mine, theirs)) = open.pop() {
            if shorter.last[theirs] {
                self.next[mine].iter().for_each(|place| beyond.add(&self.sets[*place]));
            }
            if !reach(&self.next[mine], &shorter.next[theirs], &mut open) {
                return None;
            }
        }
        Some(beyond)
    }
}
