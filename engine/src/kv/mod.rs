//! KV blocks: who owns which, and nothing about what is in them.
//!
//! A *block* holds `block_size` tokens of keys and values of all layers. [`BlockPool`] owns the numbers; a [`BlockTable`] owns
//! references to some of them and gives them back when dropped. `free + owned + cached = total` holds at all times;
//! `cached` counts blocks that nobody references but whose content is kept.

mod events;

use std::{fmt, sync::Arc};

pub use events::{BlockHash, KvEvent, KvEventBatch};
use parking_lot::Mutex;

use crate::ids::BlockId;

/// Blocks by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockCounts {
    /// Nobody references them.
    pub free: usize,
    /// Referenced by at least one table.
    pub owned: usize,
    /// Unreferenced, content kept for reuse.
    pub cached: usize,
    /// All.
    pub total: usize,
}

struct Blocks {
    /// Stack of free ids: the block freed last is handed out first, while it is warm in the caches.
    free: Vec<BlockId>,
    /// References per block.
    refs: Vec<u32>,
}

/// All KV blocks of an engine. Clones are handles to the same pool.
#[derive(Clone)]
pub struct BlockPool {
    blocks: Arc<Mutex<Blocks>>,
    block_size: usize,
    total: usize,
}

impl fmt::Debug for BlockPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockPool")
            .field("block_size", &self.block_size)
            .field("counts", &self.counts())
            .finish()
    }
}

impl BlockPool {
    /// A pool of `total` free blocks of `block_size` tokens. Both are at least 1.
    pub fn new(total: usize, block_size: usize) -> Self {
        assert!(total >= 1 && block_size >= 1, "a pool needs at least one block of at least one token");
        let ids = u32::try_from(total).expect("block counts are checked against u32 when the cache is sized");
        let blocks = Blocks { free: (0..ids).rev().map(BlockId).collect(), refs: vec![0; total] };
        Self { blocks: Arc::new(Mutex::new(blocks)), block_size, total }
    }

    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks by state.
    pub fn counts(&self) -> BlockCounts {
        let free = self.blocks.lock().free.len();
        BlockCounts { free, owned: self.total - free, cached: 0, total: self.total }
    }

    /// An empty table that draws from this pool.
    pub fn table(&self) -> BlockTable {
        BlockTable { pool: self.clone(), ids: Vec::new() }
    }

    /// Recounts everything from the reference counts: the free list holds each unreferenced block once and no other.
    pub fn is_consistent(&self) -> bool {
        let blocks = self.blocks.lock();
        let mut listed = vec![false; self.total];
        let unique = blocks.free.iter().all(|id| !std::mem::replace(&mut listed[id.0 as usize], true));
        unique && listed.iter().zip(&blocks.refs).all(|(&free, &refs)| free == (refs == 0))
    }
}

/// A sequence's blocks in order. Owns one reference to each and returns them in `Drop`; never `Clone`.
#[derive(Debug)]
pub struct BlockTable {
    pool: BlockPool,
    ids: Vec<BlockId>,
}

impl BlockTable {
    /// The blocks, in sequence order.
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// Tokens that fit into the blocks.
    pub fn capacity(&self) -> usize {
        self.ids.len() * self.pool.block_size
    }

    /// Grows until `tokens` tokens fit. Takes all the blocks it needs or none.
    ///
    /// Returns false when the pool has too few; nothing has changed then.
    #[must_use]
    pub fn reserve(&mut self, tokens: usize) -> bool {
        let missing = tokens.div_ceil(self.pool.block_size).saturating_sub(self.ids.len());
        let mut blocks = self.pool.blocks.lock();
        let Some(keep) = blocks.free.len().checked_sub(missing) else { return false };
        let taken = blocks.free.split_off(keep);
        for id in taken.into_iter().rev() {
            debug_assert_eq!(blocks.refs[id.0 as usize], 0, "a free block has no references");
            blocks.refs[id.0 as usize] = 1;
            self.ids.push(id);
        }
        true
    }

    /// A second table over the first `blocks` blocks. Only for full blocks: nobody writes to them again.
    pub fn share_prefix(&self, blocks: usize) -> Self {
        let ids = self.ids[..blocks].to_vec();
        let mut pool = self.pool.blocks.lock();
        ids.iter().for_each(|id| pool.refs[id.0 as usize] += 1);
        drop(pool);
        Self { pool: self.pool.clone(), ids }
    }

    /// Gives every reference back. Returns how many blocks became free by it.
    pub fn release(&mut self) -> usize {
        let mut blocks = self.pool.blocks.lock();
        let before = blocks.free.len();
        // In reverse, so that a pool used by one sequence after another hands out the same blocks in the same order.
        for id in self.ids.drain(..).rev() {
            let refs = &mut blocks.refs[id.0 as usize];
            *refs = refs.checked_sub(1).expect("a table holds a reference to each of its blocks");
            if *refs == 0 {
                blocks.free.push(id);
            }
        }
        blocks.free.len() - before
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_back_on_drop_and_shared_ones_only_with_the_last_owner() {
        let pool = BlockPool::new(4, 16);
        let mut a = pool.table();
        assert!(a.reserve(33));
        assert_eq!(pool.counts(), BlockCounts { free: 1, owned: 3, cached: 0, total: 4 });
        let mut b = a.share_prefix(2);
        assert!(b.reserve(48), "one block is left for b's own third");
        assert_eq!(pool.counts().free, 0);
        assert_eq!(a.release(), 1, "two of a's three blocks are b's too");
        drop(b);
        assert_eq!(pool.counts().free, 4);
        assert!(pool.is_consistent());
    }

    #[test]
    fn reserve_takes_all_or_nothing() {
        let pool = BlockPool::new(3, 4);
        let mut a = pool.table();
        assert!(!a.reserve(13));
        assert_eq!((a.ids().len(), pool.counts().free), (0, 3));
        assert!(a.reserve(12) && a.reserve(5), "what is there already is not taken again");
        assert_eq!(a.ids(), [BlockId(0), BlockId(1), BlockId(2)]);
    }
}
