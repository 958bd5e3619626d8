//! A step's metadata: one array of words, sent to one place on the device in one copy.
//!
//! Kernels that run from a graph were recorded with fixed addresses, so a section begins at a place that the step's [`Extent`] alone
//! decides. The two sections whose length varies from step to step come last; what lies behind them is found through offsets in them.

use crate::ops::{BatchMeta, Extent};

/// A slot that is nobody's: what a padding token writes.
pub(super) const NO_SLOT: u32 = u32::MAX;
/// A row of logits that nobody wants.
pub(super) const NO_ROW: u32 = u32::MAX;
/// Sections begin at multiples of 16 bytes.
const ALIGN: usize = 4;

/// Where the sections of a step begin, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// `[T]`.
    pub token_ids: usize,
    /// `[T]`.
    pub positions: usize,
    /// `[T]`.
    pub slot_mapping: usize,
    /// `[R]`.
    pub logits_indices: usize,
    /// The encoded sampling tasks: `sampling_words`.
    pub sampling: usize,
    /// The attention plan; behind it the block tables, to which it refers by word.
    pub plan: usize,
}

impl Layout {
    pub fn new(extent: Extent, sampling_words: usize) -> Self {
        let mut end = 0;
        let mut section = |words: usize| {
            let start = end;
            end += words.next_multiple_of(ALIGN);
            start
        };
        Self {
            token_ids: section(extent.tokens),
            positions: section(extent.tokens),
            slot_mapping: section(extent.tokens),
            logits_indices: section(extent.logits_rows),
            sampling: section(sampling_words),
            plan: section(0),
        }
    }
}

/// A step's words.
pub(super) struct Encoded {
    pub layout: Layout,
    pub words: Vec<u32>,
}

/// Writes a step's words. `sampling` is the block of encoded tasks and `sampling_words` the room that it gets; `plan` makes the attention
/// plan, given for each row the word at which its block table begins.
pub(super) fn encode(
    meta: &BatchMeta,
    extent: Extent,
    sampling: &[u32],
    sampling_words: usize,
    plan: impl FnOnce(usize) -> Vec<u32>,
) -> Encoded {
    let layout = Layout::new(extent, sampling_words);
    let mut words = vec![0; layout.plan];
    let mut put = |at: usize, values: &[u32], len: usize, padding: u32| {
        words[at..at + values.len()].copy_from_slice(values);
        words[at + values.len()..at + len].fill(padding);
    };
    put(layout.token_ids, &meta.token_ids, extent.tokens, 0);
    put(layout.positions, &meta.positions, extent.tokens, 0);
    put(layout.slot_mapping, &meta.slot_mapping, extent.tokens, NO_SLOT);
    put(layout.logits_indices, &meta.logits_indices, extent.logits_rows, NO_ROW);
    put(layout.sampling, sampling, sampling_words, 0);
    words.extend(plan(layout.plan));
    Encoded { layout, words }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_touches_nothing_and_the_plan_stands_where_the_extent_says() {
        let meta = BatchMeta {
            token_ids: vec![7, 8, 9],
            positions: vec![5, 0, 3],
            slot_mapping: vec![21, 48, 3],
            logits_indices: vec![0, 2],
            ..BatchMeta::default()
        };
        let extent = Extent { tokens: 4, logits_rows: 4 };
        let Encoded { layout, words } = encode(&meta, extent, &[1, 2, 3, 4, 5], 7, |at| vec![at as u32; 2]);
        assert_eq!(words[layout.token_ids..][..4], [7, 8, 9, 0]);
        assert_eq!(words[layout.positions..][..4], [5, 0, 3, 0]);
        assert_eq!(words[layout.slot_mapping..][..4], [21, 48, 3, NO_SLOT]);
        assert_eq!(words[layout.logits_indices..][..4], [0, 2, NO_ROW, NO_ROW]);
        assert_eq!(words[layout.sampling..][..8], [1, 2, 3, 4, 5, 0, 0, 0]);
        assert_eq!(words[layout.plan..], [layout.plan as u32; 2]);
        assert_eq!(Layout::new(extent, 7), layout);
    }
}
