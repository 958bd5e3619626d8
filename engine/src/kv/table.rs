//! A sequence's blocks.

use super::{
    BlockHash, BlockPool,
    blocks::Blocks,
    prefix::{Link, NodeId},
};
use crate::ids::{BlockId, TokenId};

/// What room for a sequence takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    /// Blocks that must be taken, after those that are there already and referenced by others.
    pub needed: usize,
    /// Blocks that can be had.
    pub available: usize,
    /// Tokens that are there already.
    pub cached_tokens: usize,
}

/// A sequence's blocks in order. Owns one reference to each and returns them in `Drop`; never `Clone`.
#[derive(Debug)]
pub struct BlockTable {
    pool: BlockPool,
    ids: Vec<BlockId>,
    root: BlockHash,
    /// Of the full blocks of the sequence as far as they were needed. They stay when the blocks go: tokens are only ever appended.
    hashes: Vec<BlockHash>,
    /// Blocks whose chain is in the index.
    registered: usize,
    /// The last of them.
    node: NodeId,
}

impl BlockTable {
    pub(super) fn new(pool: BlockPool, root: BlockHash) -> Self {
        Self { pool, ids: Vec::new(), root, hashes: Vec::new(), registered: 0, node: NodeId::ROOT }
    }

    /// The blocks, in sequence order.
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// The beginning that it shares with those it can share blocks with.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// Tokens that fit into the blocks.
    pub fn capacity(&self) -> usize {
        self.ids.len() * self.pool.block_size
    }

    /// Makes room in its lists for the blocks of so many tokens, so that growing up to there allocates nothing.
    pub fn prepare(&mut self, tokens: usize) {
        let blocks = tokens.div_ceil(self.pool.block_size);
        self.ids.reserve_exact(blocks.saturating_sub(self.ids.len()));
        self.hashes.reserve_exact(blocks.saturating_sub(self.hashes.len()));
    }

    /// Blocks up to which its list does not grow.
    pub fn room(&self) -> usize {
        self.ids.capacity()
    }

    /// What it takes to hold all of `tokens`, at most `reuse` of which may be found in the prefix cache; as it would be if somebody gave
    /// one reference to each of `given_back` back. The table is empty.
    pub fn probe(&mut self, tokens: &[TokenId], reuse: usize, given_back: &[BlockId]) -> Fit {
        debug_assert!(self.ids.is_empty());
        let pool = self.pool.clone();
        let mut blocks = pool.blocks.lock();
        let reusable = self.extend_hashes(&mut blocks, tokens, reuse);
        let probe = blocks.probe(reusable, |at, node| self.link(tokens, at, node), given_back);
        let all = tokens.len().div_ceil(pool.block_size);
        Fit {
            needed: all - probe.hits + probe.taken,
            available: probe.available,
            cached_tokens: probe.hits * pool.block_size,
        }
    }

    /// Takes over the blocks that hold the beginning of `tokens`, at most `reuse` tokens. Returns the tokens they hold. The table is
    /// empty.
    pub fn match_prefix(&mut self, tokens: &[TokenId], reuse: usize) -> usize {
        debug_assert!(self.ids.is_empty());
        let pool = self.pool.clone();
        let mut blocks = pool.blocks.lock();
        let reusable = self.extend_hashes(&mut blocks, tokens, reuse);
        let mut ids = std::mem::take(&mut self.ids);
        self.node = blocks.acquire_chain(reusable, |at, node| self.link(tokens, at, node), &mut ids);
        self.ids = ids;
        self.registered = self.ids.len();
        self.capacity()
    }

    /// Grows until `tokens` tokens fit. Takes all the blocks it needs or none.
    ///
    /// Returns false when the pool has too few; nothing has changed then.
    #[must_use]
    pub fn reserve(&mut self, tokens: usize) -> bool {
        let missing = tokens.div_ceil(self.pool.block_size).saturating_sub(self.ids.len());
        if missing == 0 {
            return true;
        }
        let mut blocks = self.pool.blocks.lock();
        if !blocks.can_take(missing) {
            return false;
        }
        self.ids.extend((0..missing).map(|_| blocks.take().expect("counted above")));
        true
    }

    /// Lets others find the full blocks of `computed`, the tokens whose keys and values are there.
    pub fn register(&mut self, computed: &[TokenId]) {
        let size = self.pool.block_size;
        if (self.registered + 1) * size > computed.len() {
            return;
        }
        let pool = self.pool.clone();
        let mut blocks = pool.blocks.lock();
        let full = self.extend_hashes(&mut blocks, computed, computed.len());
        while self.registered < full {
            let link = self.link(computed, self.registered, self.node);
            self.node = blocks.register(link, self.ids[self.registered]);
            self.registered += 1;
        }
    }

    /// Gives every reference back. Returns how many blocks nobody references any more: they are free, or cached.
    pub fn release(&mut self) -> usize {
        (self.registered, self.node) = (0, NodeId::ROOT);
        if self.ids.is_empty() {
            return 0;
        }
        let mut blocks = self.pool.blocks.lock();
        // In reverse: the end of a chain is given up before its beginning, and a pool used by one sequence after another hands
        // out the same blocks in the same order.
        self.ids.drain(..).rev().map(|id| usize::from(blocks.release(id))).sum()
    }

    /// Makes the hashes of the full blocks among the first `limit` of `tokens`. Returns how many these are.
    fn extend_hashes(&mut self, blocks: &mut Blocks, tokens: &[TokenId], limit: usize) -> usize {
        let size = self.pool.block_size;
        let full = tokens.len().min(limit) / size;
        while self.hashes.len() < full {
            let at = self.hashes.len();
            let before = self.hashes.last().copied().unwrap_or(self.root);
            self.hashes.push(blocks.hash(before, &tokens[at * size..][..size]));
        }
        full
    }

    fn link<'a>(&self, tokens: &'a [TokenId], at: usize, parent: NodeId) -> Link<'a> {
        let size = self.pool.block_size;
        Link {
            root: self.root,
            parent,
            parent_hash: at.checked_sub(1).map(|before| self.hashes[before]),
            hash: self.hashes[at],
            tokens: &tokens[at * size..][..size],
        }
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.release();
    }
}
