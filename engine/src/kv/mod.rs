//! KV blocks: who owns which, which hold what, and nothing about the bytes in them.
//!
//! A *block* holds `block_size` tokens of keys and values of all layers. [`BlockPool`] owns the numbers; a [`BlockTable`] owns
//! references to some of them and gives them back when dropped. `free + owned + cached = total` holds at all times;
//! `cached` counts blocks that nobody references but whose content is kept.
//!
//! A full block is *registered* once its content is there ([`BlockTable::register`]). Others with the same beginning find it
//! ([`BlockTable::match_prefix`]), while it is referenced and after, until it is given up for a new one: least recently used first. What is given up
//! may go to host memory ([`CacheConfig::host_blocks`]) and come back; the copies are handed out with the next plan
//! ([`BlockPool::take_copies`]).

mod blocks;
mod events;
mod lru;
mod prefix;
mod table;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc};

use blocks::Blocks;
pub use events::{BlockHash, KvEvent, KvEventBatch};
use parking_lot::Mutex;
pub use table::{BlockTable, Fit};

use crate::{
    activity::BlockMap,
    ids::{BlockId, HostBlockId, TokenId},
};

/// Blocks by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockCounts {
    /// Nobody references them, and nothing is in them.
    pub free: usize,
    /// Referenced by at least one table.
    pub owned: usize,
    /// Unreferenced, content kept for reuse.
    pub cached: usize,
    /// All.
    pub total: usize,
}

/// How a pool keeps what nobody references any more.
#[derive(Debug, Clone, Copy)]
pub struct CacheConfig {
    /// Key of the hashes. Random in production, so that nobody can prepare collisions.
    pub key: [u8; 32],
    /// Collect [`KvEvent`]s.
    pub events: bool,
    /// Blocks of host memory for what is given up on the device.
    pub host_blocks: usize,
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
    /// A pool of `total` free blocks of `block_size` tokens, which forgets what nobody references. Both are at least 1.
    pub fn new(total: usize, block_size: usize) -> Self {
        Self::build(total, block_size, None)
    }

    /// The same with a prefix cache.
    pub fn with_cache(total: usize, block_size: usize, cache: CacheConfig) -> Self {
        Self::build(total, block_size, Some(cache))
    }

    fn build(total: usize, block_size: usize, cache: Option<CacheConfig>) -> Self {
        assert!(total >= 1 && block_size >= 1, "a pool needs at least one block of at least one token");
        let blocks = Arc::new(Mutex::new(Blocks::new(total, block_size, cache)));
        Self { blocks, block_size, total }
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
        self.blocks.lock().counts()
    }

    /// What is in each block; all that are referenced are [`BlockMap::UNLISTED`].
    pub fn map(&self) -> BlockMap {
        let blocks_per_cell = BlockMap::blocks_per_cell(self.total);
        let mut cells = vec![BlockMap::FREE; self.total.div_ceil(blocks_per_cell)];
        self.blocks.lock().paint(&mut cells, blocks_per_cell);
        BlockMap { total: self.total, blocks_per_cell, cells }
    }

    /// Blocks of host memory that hold something.
    pub fn num_host_blocks_used(&self) -> usize {
        self.blocks.lock().num_host_used()
    }

    /// The beginning of the chains of a request: only chains of the same beginning share blocks. `parts` tell beginnings apart (model, credential,
    /// salt). Without a prefix cache only the completions of one request share, so `request` does too.
    pub fn prefix_root(&self, parts: &[&str], request: u64) -> BlockHash {
        self.blocks.lock().root(parts, request)
    }

    /// An empty table of this beginning that draws from this pool.
    pub fn table(&self, root: BlockHash) -> BlockTable {
        BlockTable::new(self.clone(), root)
    }

    /// Moves the copies between device and host that have become due to the ends of these lists. They must be executed before anything writes to a
    /// block that was reserved since; `loads` are to be handed to [`BlockPool::loaded`] once they are done.
    pub fn take_copies(
        &self,
        saves: &mut Vec<(BlockId, HostBlockId)>,
        loads: &mut Vec<(HostBlockId, BlockId)>,
    ) {
        self.blocks.lock().take_copies(saves, loads);
    }

    /// Gives the places in host memory back from which these copies were made.
    pub fn loaded(&self, loads: &[(HostBlockId, BlockId)]) {
        if !loads.is_empty() {
            self.blocks.lock().loaded(loads);
        }
    }

    /// Forgets everything that is registered. What nobody references becomes free; returns how many blocks that are.
    pub fn clear_cache(&self) -> usize {
        self.blocks.lock().clear()
    }

    /// Moves the events since the last call to the end of `events`.
    pub fn take_events(&self, events: &mut Vec<KvEvent>) {
        self.blocks.lock().take_events(events);
    }

    /// Everything that is registered, as events that store it.
    pub fn snapshot(&self) -> Vec<KvEvent> {
        self.blocks.lock().snapshot()
    }

    /// The tokens that a block's keys and values are known to be of, if it is registered.
    pub fn tokens_of(&self, block: BlockId) -> Option<Vec<TokenId>> {
        self.blocks.lock().tokens_of(block).map(<[_]>::to_vec)
    }

    /// References to a block.
    pub fn references(&self, block: BlockId) -> usize {
        self.blocks.lock().references(block)
    }

    /// Recounts everything: each block is either referenced, or free and empty, or cached and registered; the index names what is there.
    pub fn is_consistent(&self) -> bool {
        self.blocks.lock().is_consistent()
    }
}
