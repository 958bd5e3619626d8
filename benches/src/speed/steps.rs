//! Metadata of steps, as a scheduler would make them.

use std::sync::Arc;

use tidemill_kernels::{
    ops::BatchMeta,
    sampling::{RowTask, SampleSpec},
};

/// Tokens per KV block.
pub const BLOCK_SIZE: usize = 16;

/// `rows` sequences that each compute `new` tokens and then have `context` tokens in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Number of the first sequence: sequences keep their blocks.
    pub first: usize,
    /// Sequences.
    pub rows: usize,
    /// New tokens of each.
    pub new: usize,
    /// Tokens of each in the cache afterwards.
    pub context: usize,
}

impl Step {
    /// Sequences from 0 on.
    pub fn of(rows: usize, new: usize, context: usize) -> Self {
        Self { first: 0, rows, new, context }
    }

    /// The metadata. `capacity` is the number of tokens that a sequence may come to, and so of its blocks; blocks of all
    /// sequences lie in no order, as they do after a while. Logits are wanted of each sequence's last token.
    pub fn meta(self, layout: Layout, vocab: usize) -> BatchMeta {
        let Step { first, rows, new, context } = self;
        let max_blocks = context.div_ceil(BLOCK_SIZE);
        let mut meta = BatchMeta { max_blocks, cu_seqlens_q: vec![0], ..BatchMeta::default() };
        for row in 0..rows {
            let block = |index: usize| layout.block(first + row, index);
            for position in context - new..context {
                // Any ids below V, different from each other.
                let token = (position * 7919 + (first + row) * 104_729 + 17) % vocab;
                meta.token_ids.push(token as u32);
                meta.positions.push(position as u32);
                meta.slot_mapping
                    .push(block(position / BLOCK_SIZE) * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32);
            }
            meta.cu_seqlens_q.push(meta.token_ids.len() as u32);
            meta.context_lens.push(context as u32);
            meta.block_tables.extend((0..max_blocks).map(block));
            meta.logits_indices.push(meta.token_ids.len() as u32 - 1);
        }
        meta
    }
}

/// Where sequences keep their tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    sequences: usize,
    blocks: usize,
}

impl Layout {
    /// Room for so many sequences of so many tokens.
    pub fn new(sequences: usize, tokens: usize) -> Self {
        Self { sequences, blocks: tokens.div_ceil(BLOCK_SIZE) }
    }

    /// Blocks in all.
    pub fn num_blocks(self) -> usize {
        self.sequences * self.blocks
    }

    /// The block that holds the `index`-th 16 tokens of a sequence: consecutive ones lie a golden section of the pool apart.
    fn block(self, sequence: usize, index: usize) -> u32 {
        let (all, place) = (self.num_blocks(), sequence * self.blocks + index);
        let mut stride = (all as f64 * 0.618) as usize | 1;
        while gcd(stride, all) != 1 {
            stride += 2;
        }
        (place * stride % all) as u32
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// One task per row: how each row's token is chosen.
pub fn tasks(rows: usize, spec: &SampleSpec) -> Arc<[RowTask]> {
    let task =
        |row| RowTask::Sample(SampleSpec { seed: row as u64, position: row as u32, ..spec.clone() }, None);
    (0..rows).map(task).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_token_has_a_slot_of_its_own_in_its_own_block() {
        let layout = Layout::new(3, 50);
        let meta = Step::of(3, 50, 50).meta(layout, 100);
        let slots: HashSet<u32> = meta.slot_mapping.iter().copied().collect();
        assert_eq!(slots.len(), 150);
        assert!(slots.iter().all(|&slot| (slot as usize) < layout.num_blocks() * BLOCK_SIZE));
        let later = Step { first: 1, rows: 1, new: 1, context: 50 }.meta(layout, 100);
        assert_eq!(later.slot_mapping, [meta.slot_mapping[99]], "the same place in a later step");
        assert_eq!(meta.logits_indices, [49, 99, 149]);
    }
}
