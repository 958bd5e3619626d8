//! Sets of characters.

/// Characters, as ordered ranges that neither touch nor overlap. Surrogates may lie within a range and mean nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct CharSet(Vec<(u32, u32)>);

impl CharSet {
    pub fn single(c: char) -> Self {
        Self(vec![(u32::from(c), u32::from(c))])
    }

    pub fn any() -> Self {
        Self(vec![(0, u32::from(char::MAX))])
    }

    /// The characters of these ranges, ends included.
    pub fn new(mut ranges: Vec<(u32, u32)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    /// All other characters.
    pub fn negated(&self) -> Self {
        let mut others = Vec::with_capacity(self.0.len() + 1);
        let mut next = 0;
        for &(first, last) in &self.0 {
            if first > next {
                others.push((next, first - 1));
            }
            next = last + 1;
        }
        if next <= u32::from(char::MAX) {
            others.push((next, u32::from(char::MAX)));
        }
        Self(others)
    }

    pub fn add(&mut self, other: &Self) {
        *self = Self::new(self.0.iter().chain(&other.0).copied().collect());
    }

    pub fn meets(&self, other: &Self) -> bool {
        let (mut mine, mut theirs) = (self.0.iter().peekable(), other.0.iter().peekable());
        while let (Some(a), Some(b)) = (mine.peek(), theirs.peek()) {
            if a.0.max(b.0) <= a.1.min(b.1) {
                return true;
            }
            if a.1 < b.1 {
                mine.next()
            } else {
                theirs.next()
            };
        }
        false
    }

    pub fn is_empty(&self) -> bool {
        self.ranges().next().is_none()
    }

    /// The only character, if there is just one.
    pub fn only(&self) -> Option<char> {
        match self.0[..] {
            [(first, last)] if first == last => char::from_u32(first),
            _ => None,
        }
    }

    /// The ranges without surrogates.
    pub fn ranges(&self) -> impl Iterator<Item = (char, char)> + '_ {
        self.0.iter().flat_map(|&(first, last)| {
            let below = (first, last.min(0xd7ff));
            let above = (first.max(0xe000), last);
            [below, above]
                .into_iter()
                .filter(|(first, last)| first <= last)
                .filter_map(|(first, last)| Some((char::from_u32(first)?, char::from_u32(last)?)))
        })
    }
}
