//! The order in which unreferenced blocks are given up.

/// A list of block numbers by age, with removal from anywhere: links between the elements of a fixed array.
#[derive(Debug)]
pub(super) struct Lru {
    /// Per number: the older neighbour and the younger one; its own number marks one that is not in the list.
    links: Vec<(u32, u32)>,
    oldest: u32,
    youngest: u32,
    len: usize,
}

/// No neighbour.
const END: u32 = u32::MAX;

impl Lru {
    /// An empty list for the numbers `0..capacity`.
    pub fn new(capacity: usize) -> Self {
        let capacity =
            u32::try_from(capacity).expect("block counts are checked against u32 when the cache is sized");
        Self { links: (0..capacity).map(|n| (n, n)).collect(), oldest: END, youngest: END, len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn contains(&self, number: u32) -> bool {
        self.links[number as usize] != (number, number)
    }

    /// All of them, by number.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        let listed = |(number, link): (u32, &(u32, u32))| (*link != (number, number)).then_some(number);
        (0..).zip(&self.links).filter_map(listed)
    }

    /// Makes a number that is not in the list its youngest.
    pub fn push(&mut self, number: u32) {
        debug_assert!(!self.contains(number), "in the list once");
        let before = std::mem::replace(&mut self.youngest, number);
        self.links[number as usize] = (before, END);
        match before {
            END => self.oldest = number,
            before => self.links[before as usize].1 = number,
        }
        self.len += 1;
    }

    /// Takes a number out that is in the list.
    pub fn remove(&mut self, number: u32) {
        debug_assert!(self.contains(number), "only what is in the list is taken out");
        let (older, younger) = std::mem::replace(&mut self.links[number as usize], (number, number));
        match older {
            END => self.oldest = younger,
            older => self.links[older as usize].1 = younger,
        }
        match younger {
            END => self.youngest = older,
            younger => self.links[younger as usize].0 = older,
        }
        self.len -= 1;
    }

    /// Takes the oldest out.
    pub fn pop(&mut self) -> Option<u32> {
        let oldest = (self.oldest != END).then_some(self.oldest)?;
        self.remove(oldest);
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first_whatever_was_taken_out_between() {
        let mut lru = Lru::new(5);
        (0..5).for_each(|n| lru.push(n));
        [2, 0, 4].into_iter().for_each(|n| lru.remove(n));
        assert_eq!((lru.len(), lru.contains(0), lru.contains(1)), (2, false, true));
        lru.push(0);
        assert_eq!([lru.pop(), lru.pop(), lru.pop(), lru.pop()], [Some(1), Some(3), Some(0), None]);
        lru.push(2);
        assert_eq!((lru.pop(), lru.len()), (Some(2), 0));
    }
}
