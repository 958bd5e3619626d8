//! Which steps run from a graph.
//!
//! Steps that only decode look alike up to the number of their rows. That is padded to one of a few sizes, and for each a graph
//! is recorded the first time it occurs: at start-up, when the decoder warms up.

use std::collections::HashMap;

use super::{
    memory::Graph,
    ops::{Needs, mask_words},
};

/// Room for lists of tasks per row in steps that run from a graph: some stop tokens, some biases. Steps with more run without.
const LIST_WORDS: usize = 16;

/// The lists that a graph has room for. Where they lie is recorded with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GraphLists {
    /// A mask of allowed tokens for every row. Steps without one have graphs of their own, so that they do not upload room for masks.
    pub masked: bool,
}

impl GraphLists {
    /// Words for the lists of so many rows.
    pub fn words(self, rows: usize, vocab: usize) -> usize {
        rows * (LIST_WORDS + if self.masked { mask_words(vocab) } else { 0 })
    }
}

/// What two steps must share to run from the same graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    /// Rows, padding included.
    pub rows: usize,
    /// Kernels of the sampler.
    pub filters: bool,
    /// As above.
    pub logprobs: bool,
    /// Room for lists.
    pub lists: GraphLists,
}

impl GraphKey {
    pub fn new(rows: usize, needs: Needs, lists: GraphLists) -> Self {
        Self { rows, filters: needs.filters, logprobs: needs.logprobs, lists }
    }
}

/// The graphs of one device.
pub(super) struct Graphs {
    /// Padded numbers of rows, rising; empty: no graphs.
    sizes: Vec<usize>,
    recorded: HashMap<GraphKey, Graph>,
}

impl Graphs {
    /// For steps of up to `max_rows` rows.
    pub fn new(max_rows: usize) -> Self {
        Self { sizes: sizes(max_rows), recorded: HashMap::new() }
    }

    /// No graphs: every kernel is launched by itself.
    pub fn off() -> Self {
        Self { sizes: Vec::new(), recorded: HashMap::new() }
    }

    /// All padded numbers of rows.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// The smallest padded number of rows that holds `rows`.
    pub fn padded(&self, rows: usize) -> Option<usize> {
        self.sizes.iter().copied().find(|&size| size >= rows)
    }

    pub fn get(&self, key: GraphKey) -> Option<&Graph> {
        self.recorded.get(&key)
    }

    pub fn insert(&mut self, key: GraphKey, graph: Graph) {
        self.recorded.insert(key, graph);
    }

    /// Forgets all: memory that they were recorded with has moved. Nothing queued may use them.
    pub fn clear(&mut self) {
        self.recorded.clear();
    }
}

/// 1, 2, 4, 8, then steps of 8 to 64, of 16 to 256, of 32 beyond: at most a quarter of a step's rows is padding from 8 on.
fn sizes(max_rows: usize) -> Vec<usize> {
    let mut sizes = vec![1];
    while let Some(&last) = sizes.last().filter(|&&last| last < max_rows) {
        let next = match last {
            0..8 => 2 * last,
            8..64 => last + 8,
            64..256 => last + 16,
            _ => last + 32,
        };
        sizes.push(next.min(max_rows));
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_reach_the_largest_step_and_waste_little() {
        assert_eq!(sizes(1), [1]);
        assert_eq!(sizes(5), [1, 2, 4, 5]);
        assert_eq!(sizes(20), [1, 2, 4, 8, 16, 20]);
        let graphs = Graphs::new(1000);
        for rows in 1..=1000 {
            let padded = graphs.padded(rows).unwrap_or(0);
            assert!(padded >= rows && padded - rows <= (rows / 4).max(7), "{rows} {padded}");
        }
        assert_eq!(graphs.padded(1001), None);
        assert_eq!(Graphs::off().padded(1), None);
    }
}
