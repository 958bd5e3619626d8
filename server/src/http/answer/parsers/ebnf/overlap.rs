//! Where taking the longest lexeme could lose a sentence.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    CharSet, Rule,
    automaton::Automaton,
    shape::{Node, Shape},
};

/// Grammars with more lexemes or references in their recursive rules, or more work to look at, are refused.
const MOST_PLACES: usize = 1000;
const MOST_REFERENCES: usize = 4000;
const MOST_WORK: usize = 20_000_000;

/// Finds lexemes that must be taken apart, and remembers what it learnt about each.
///
/// At any point the lexer knows a set of lexemes that may come. When one of them matches and another (or a longer match of
/// the same) could still go on with the next character, it goes on, and never comes back. That is wrong only if this
/// character could also have come after the shorter match. Whether it could is looked at place by place, with what may
/// come after a rule taken together from all places that refer to it: so too much may be taken apart, never too little.
#[derive(Default)]
pub(super) struct Overlaps {
    /// For each lexeme; `None` when it is too large to look at.
    automata: Vec<Option<Automaton>>,
    beginnings: Vec<CharSet>,
    /// For a shorter and a longer lexeme, the characters with which the longer can go on.
    beyond: HashMap<(usize, usize), Option<CharSet>>,
    /// Steps taken, for [`MOST_WORK`].
    work: usize,
}

impl Overlaps {
    /// The lexemes to take apart.
    pub fn find(&mut self, rules: &[Rule], shape: &Shape, root: usize) -> Result<HashSet<usize>, String> {
        for lexeme in &shape.lexemes[self.automata.len()..] {
            let automaton = Automaton::new(lexeme, rules);
            self.beginnings.push(automaton.as_ref().map(Automaton::beginnings).unwrap_or_default());
            self.automata.push(automaton);
        }
        let mut map = Map::new(shape, &self.automata)?;
        let used: HashSet<usize> = map.places.iter().copied().collect();
        let large: HashSet<usize> =
            used.into_iter().filter(|lexeme| self.automata[*lexeme].is_none()).collect();
        if !large.is_empty() {
            return Ok(large);
        }
        map.link(shape, &mut self.work);
        let after = map.after(&self.beginnings);
        let together = map.together(root, &self.beginnings, &mut self.work)?;
        let mut split = HashSet::new();
        for (short, others) in together.iter().enumerate() {
            for long in others.iter() {
                let (a, b) = (map.places[short], map.places[long]);
                if !split.contains(&b) && self.goes_beyond(a, b, &after[short]) {
                    split.insert(b);
                }
            }
        }
        Ok(split)
    }

    /// Whether the second lexeme can go on with one of these characters where the first has matched.
    fn goes_beyond(&mut self, short: usize, long: usize, after: &CharSet) -> bool {
        let (Some(shorter), Some(longer)) = (&self.automata[short], &self.automata[long]) else {
            return false;
        };
        let beyond = self.beyond.entry((short, long)).or_insert_with(|| longer.beyond(shorter));
        beyond.as_ref().is_none_or(|beyond| beyond.meets(after))
    }
}

/// A set of places.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Places(Vec<u64>);

impl Places {
    fn new(count: usize) -> Self {
        Self(vec![0; count.div_ceil(64)])
    }

    fn insert(&mut self, place: usize) {
        self.0[place / 64] |= 1 << (place % 64);
    }

    fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(mine, theirs)| *mine |= theirs);
    }

    fn without(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(mine, theirs)| mine & !theirs).collect())
    }

    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(word, bits)| {
            (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * 64 + bit)
        })
    }
}

/// What a part of a rule may begin and end with.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ends {
    nullable: bool,
    first: Places,
    last: Places,
}

/// All places of lexemes in the rules.
struct Map {
    /// The lexeme at each place, in the order of the rules.
    places: Vec<usize>,
    nullable: Vec<bool>,
    ends: BTreeMap<usize, Ends>,
    follow: Vec<Places>,
}

impl Map {
    fn new(shape: &Shape, automata: &[Option<Automaton>]) -> Result<Self, String> {
        let mut places = Vec::new();
        let references: usize = shape.rules.values().map(|node| collect(node, &mut places)).sum();
        if places.len() > MOST_PLACES || references > MOST_REFERENCES {
            return Err("the grammar's recursive rules have too many parts to be translated".to_owned());
        }
        let nothing =
            Ends { nullable: false, first: Places::new(places.len()), last: Places::new(places.len()) };
        Ok(Self {
            nullable: automata
                .iter()
                .map(|automaton| automaton.as_ref().is_some_and(|a| a.nullable))
                .collect(),
            ends: shape.rules.keys().map(|rule| (*rule, nothing.clone())).collect(),
            follow: vec![Places::new(places.len()); places.len()],
            places,
        })
    }

    /// Finds what each rule begins and ends with, and what follows each place.
    fn link(&mut self, shape: &Shape, work: &mut usize) {
        let mut changed = true;
        while changed && *work < MOST_WORK {
            changed = false;
            let mut place = 0;
            *work += (self.places.len() + shape.rules.len()) * (1 + self.places.len() / 64);
            for (rule, node) in &shape.rules {
                let ends = self.ends(node, &mut place);
                changed |= self.ends.insert(*rule, ends.clone()) != Some(ends);
            }
        }
    }

    fn ends(&mut self, node: &Node, place: &mut usize) -> Ends {
        let count = self.places.len();
        let mut whole = Ends { nullable: false, first: Places::new(count), last: Places::new(count) };
        match node {
            Node::Lexeme(lexeme) => {
                whole.nullable = self.nullable[*lexeme];
                whole.first.insert(*place);
                whole.last.insert(*place);
                *place += 1;
            }
            Node::Rule(rule) => whole = self.ends.get(rule).cloned().unwrap_or(whole),
            Node::Alt(items) => {
                for item in items {
                    let part = self.ends(item, place);
                    whole.nullable |= part.nullable;
                    whole.first.add(&part.first);
                    whole.last.add(&part.last);
                }
            }
            Node::Seq(items) => {
                whole.nullable = true;
                for item in items {
                    let part = self.ends(item, place);
                    self.join(&whole.last, &part.first);
                    if whole.nullable {
                        whole.first.add(&part.first);
                    }
                    if !part.nullable {
                        whole.last = Places::new(count);
                    }
                    whole.last.add(&part.last);
                    whole.nullable &= part.nullable;
                }
            }
            Node::Repeat(item, least, most) => {
                whole = self.ends(item, place);
                if most.is_none_or(|most| most > 1) {
                    self.join(&whole.last.clone(), &whole.first);
                }
                whole.nullable |= *least == 0;
            }
        }
        whole
    }

    fn join(&mut self, from: &Places, to: &Places) {
        for place in from.iter() {
            self.follow[place].add(to);
        }
    }

    /// Characters that may come after each place.
    fn after(&self, beginnings: &[CharSet]) -> Vec<CharSet> {
        self.follow
            .iter()
            .map(|follow| {
                let lexemes: HashSet<usize> = follow.iter().map(|place| self.places[place]).collect();
                let mut all = CharSet::default();
                lexemes.into_iter().for_each(|lexeme| all.add(&beginnings[lexeme]));
                all
            })
            .collect()
    }

    /// For each place, the places that the lexer may look for at the same time: those that follow the same place, or two
    /// places that were looked for together and may match the same text.
    fn together(&self, root: usize, beginnings: &[CharSet], work: &mut usize) -> Result<Vec<Places>, String> {
        let count = self.places.len();
        let mut together = vec![Places::new(count); count];
        let mut open = Vec::new();
        let mut meet = |a: &Places, b: &Places, open: &mut Vec<(usize, usize)>| {
            for place in a.iter() {
                *work += 1 + count / 64;
                let new = b.without(&together[place]);
                together[place].add(&new);
                open.extend(new.iter().map(|other| (place, other)));
            }
            *work < MOST_WORK
        };
        let mut fits = true;
        if let Some(ends) = self.ends.get(&root) {
            fits &= meet(&ends.first, &ends.first, &mut open);
        }
        for follow in &self.follow {
            fits &= meet(follow, follow, &mut open);
        }
        while let Some((a, b)) = open.pop() {
            if fits && beginnings[self.places[a]].meets(&beginnings[self.places[b]]) {
                fits &= meet(&self.follow[a], &self.follow[b], &mut open);
            }
        }
        if fits { Ok(together) } else { Err("the grammar's recursive rules are too entangled".to_owned()) }
    }
}

/// Collects a rule's lexemes in order; gives the number of its references to rules.
fn collect(node: &Node, places: &mut Vec<usize>) -> usize {
    match node {
        Node::Lexeme(lexeme) => {
            places.push(*lexeme);
            0
        }
        Node::Rule(_) => 1,
        Node::Seq(items) | Node::Alt(items) => items.iter().map(|item| collect(item, places)).sum(),
        Node::Repeat(item, ..) => collect(item, places),
    }
}
