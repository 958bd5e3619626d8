//! The state of all blocks.

use super::{
    BlockCounts, BlockHash, CacheConfig, KvEvent,
    lru::Lru,
    prefix::{Link, NodeId, Place, PrefixIndex},
};
use crate::{
    activity::BlockMap,
    ids::{BlockId, HostBlockId, TokenId},
    planted::{Bug, planted},
};

/// The state of all blocks, behind the pool's lock.
pub(super) struct Blocks {
    /// Stack of free ids: the block freed last is handed out first, while it is warm in the caches.
    free: Vec<BlockId>,
    /// References per block.
    refs: Vec<u32>,
    /// Registered blocks that nobody references.
    cached: Lru,
    index: PrefixIndex,
    /// Registered blocks stay when nobody references them.
    keep: bool,
    events: Option<Vec<KvEvent>>,
    host_free: Vec<HostBlockId>,
    /// Registered blocks in host memory.
    host_cached: Lru,
    saves: Vec<(BlockId, HostBlockId)>,
    /// Their places in host memory are neither free nor registered, until the copies are done.
    loads: Vec<(HostBlockId, BlockId)>,
    /// Found places of a chain, kept for the memory.
    found: Vec<(NodeId, Place)>,
}

impl Blocks {
    pub fn new(total: usize, block_size: usize, cache: Option<CacheConfig>) -> Self {
        let ids = u32::try_from(total).expect("block counts are checked against u32 when the cache is sized");
        let config = cache.unwrap_or(CacheConfig { key: [0; 32], events: false, host_blocks: 0 });
        let host = u32::try_from(config.host_blocks).expect("checked when host memory is sized");
        Self {
            free: (0..ids).rev().map(BlockId).collect(),
            refs: vec![0; total],
            cached: Lru::new(total),
            index: PrefixIndex::new(config.key, block_size, total, config.host_blocks),
            keep: cache.is_some(),
            events: config.events.then(Vec::new),
            host_free: (0..host).rev().map(HostBlockId).collect(),
            host_cached: Lru::new(config.host_blocks),
            saves: Vec::new(),
            loads: Vec::new(),
            found: Vec::new(),
        }
    }

    pub fn counts(&self) -> BlockCounts {
        let (free, cached, total) = (self.free.len(), self.cached.len(), self.refs.len());
        BlockCounts { free, owned: total - free - cached, cached, total }
    }

    /// Writes to each cell what the busiest of its `blocks_per_cell` blocks is.
    pub fn paint(&self, cells: &mut [u16], blocks_per_cell: usize) {
        for (cell, refs) in cells.iter_mut().zip(self.refs.chunks(blocks_per_cell)) {
            if refs.iter().any(|&refs| refs > 0) {
                *cell = BlockMap::UNLISTED;
            }
        }
        for block in self.cached.iter() {
            let cell = &mut cells[block as usize / blocks_per_cell];
            *cell = (*cell).max(BlockMap::CACHED);
        }
    }

    pub fn num_host_used(&self) -> usize {
        self.host_cached.len()
    }

    pub fn root(&self, parts: &[&str], request: u64) -> BlockHash {
        let mut bytes: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
        let own = request.to_le_bytes();
        if !self.keep {
            bytes.push(&own);
        }
        self.index.root(&bytes)
    }

    pub fn hash(&mut self, before: BlockHash, tokens: &[TokenId]) -> BlockHash {
        self.index.hash(before, tokens)
    }

    fn event(&mut self, event: impl FnOnce() -> KvEvent) {
        if let Some(events) = &mut self.events {
            events.push(event());
        }
    }

    /// Whether so many blocks can be had.
    pub fn can_take(&self, count: usize) -> bool {
        count <= self.free.len() + self.cached.len()
    }

    /// A block for new content: a free one, or else the one that was not used for longest.
    pub fn take(&mut self) -> Option<BlockId> {
        let block = self.free.pop().or_else(|| self.evict())?;
        debug_assert_eq!(self.refs[block.0 as usize], 0, "a free block has no references");
        self.refs[block.0 as usize] = 1;
        Some(block)
    }

    fn evict(&mut self) -> Option<BlockId> {
        let block = BlockId(self.cached.pop()?);
        let here = Place::Device(block.0);
        if let Some(at) = self.loads.iter().position(|&(_, target)| target == block) {
            // Its content is not there yet: it stays where it is.
            let (host, _) = self.loads.swap_remove(at);
            self.index.relocate(here, Place::Host(host.0));
            self.host_cached.push(host.0);
        } else if let Some(host) = self.host_place() {
            self.index.relocate(here, Place::Host(host.0));
            self.host_cached.push(host.0);
            if !planted(Bug::SaveForgotten) {
                self.saves.push((block, host));
            }
        } else if !planted(Bug::StaleEntry) {
            let hash = self.index.forget(here);
            self.event(|| KvEvent::Removed { hash });
        }
        Some(block)
    }

    /// A place in host memory: a free one, or else the one that was filled first.
    fn host_place(&mut self) -> Option<HostBlockId> {
        self.host_free.pop().or_else(|| {
            let host = self.host_cached.pop()?;
            let hash = self.index.forget(Place::Host(host));
            // What was to be saved there is lost with it.
            self.saves.retain(|&(_, target)| target.0 != host);
            self.event(|| KvEvent::Removed { hash });
            Some(HostBlockId(host))
        })
    }

    fn acquire(&mut self, block: BlockId) {
        let refs = &mut self.refs[block.0 as usize];
        if *refs == 0 && !planted(Bug::EvictsReferenced) {
            self.cached.remove(block.0);
        }
        *refs += 1;
    }

    /// Gives one reference back. Whether it was the last.
    pub fn release(&mut self, block: BlockId) -> bool {
        let refs = &mut self.refs[block.0 as usize];
        *refs = refs.checked_sub(1).expect("a table holds a reference to each of its blocks");
        if *refs > 0 {
            return false;
        }
        match self.index.is_registered(block.0) {
            true if self.keep => self.cached.push(block.0),
            registered => {
                if registered {
                    self.index.forget(Place::Device(block.0));
                }
                self.free.push(block);
                if planted(Bug::DoubleFree) {
                    self.free.push(block);
                }
            }
        }
        true
    }

    /// Looks a chain up, block by block, to the first that is missing. `links` gives the link of a block after the node before it.
    fn walk<'a>(&mut self, blocks: usize, link: impl Fn(usize, NodeId) -> Link<'a>) {
        self.found.clear();
        let mut node = NodeId::ROOT;
        for at in 0..blocks {
            let Some((id, place)) = self.index.find(link(at, node)) else { break };
            self.found.push((id, place));
            node = id;
        }
    }

    /// How many blocks of a chain are there, and how many of these would have to be taken out of what can be had: cached ones are had no more,
    /// and those in host memory need a block. As it would be if each of `given_back` had a reference less.
    pub fn probe<'a>(
        &mut self,
        blocks: usize,
        link: impl Fn(usize, NodeId) -> Link<'a>,
        given_back: &[BlockId],
    ) -> Probe {
        self.walk(blocks, link);
        let available = self.free.len() + self.cached.len();
        let mut probe = Probe { hits: self.found.len(), taken: 0, available };
        for &BlockId(block) in given_back {
            self.refs[block as usize] -= 1;
            probe.available += usize::from(self.refs[block as usize] == 0);
        }
        for &(_, place) in &self.found {
            probe.taken += match place {
                Place::Device(block) => usize::from(self.refs[block as usize] == 0),
                Place::Host(_) => 1,
            };
        }
        given_back.iter().for_each(|id| self.refs[id.0 as usize] += 1);
        probe
    }

    /// References what is there of a chain, to the first block that is missing. Returns the last node.
    pub fn acquire_chain<'a>(
        &mut self,
        blocks: usize,
        link: impl Fn(usize, NodeId) -> Link<'a>,
        ids: &mut Vec<BlockId>,
    ) -> NodeId {
        self.walk(blocks, link);
        let found = std::mem::take(&mut self.found);
        // All of them first, so that none is given up to make room for another.
        for &(_, place) in &found {
            match place {
                Place::Device(block) => self.acquire(BlockId(block)),
                Place::Host(host) => self.host_cached.remove(host),
            }
        }
        let mut node = NodeId::ROOT;
        for &(id, place) in &found {
            let block = match place {
                Place::Device(block) => Some(BlockId(block)),
                Place::Host(host) => self.load(HostBlockId(host)),
            };
            let Some(block) = block else { break };
            ids.push(block);
            node = id;
        }
        for &(_, place) in &found[ids.len()..] {
            match place {
                Place::Device(block) => drop(self.release(BlockId(block))),
                Place::Host(host) => self.host_cached.push(host),
            }
        }
        self.found = found;
        node
    }

    /// A block for what is in host memory; its copy becomes due.
    fn load(&mut self, host: HostBlockId) -> Option<BlockId> {
        let block = self.take()?;
        self.index.relocate(Place::Host(host.0), Place::Device(block.0));
        self.loads.push((host, block));
        if planted(Bug::HostFreedEarly) {
            self.host_free.push(host);
        }
        Some(block)
    }

    /// Registers a block that is referenced and full. Returns its node, or that of another block with the same chain.
    pub fn register(&mut self, link: Link, block: BlockId) -> NodeId {
        if let Some((node, _)) = self.index.find(link) {
            return node;
        }
        loop {
            match self.index.insert(link, block.0) {
                Ok(node) => {
                    let Link { hash, parent_hash: parent, tokens, .. } = link;
                    self.event(|| KvEvent::Stored { hash, parent, tokens: tokens.to_vec() });
                    return node;
                }
                // Of a chain whose beginning is gone: nobody can find it any more.
                Err(stale) => self.discard(stale),
            }
        }
    }

    /// Forgets a registered block, wherever it is; what nobody references becomes free.
    fn discard(&mut self, place: Place) {
        let hash = self.index.forget(place);
        self.event(|| KvEvent::Removed { hash });
        match place {
            Place::Device(block) if self.refs[block as usize] == 0 => {
                self.cached.remove(block);
                self.free.push(BlockId(block));
                self.cancel_load(BlockId(block));
            }
            Place::Device(_) => {}
            Place::Host(host) => {
                self.host_cached.remove(host);
                self.saves.retain(|&(_, target)| target.0 != host);
                self.host_free.push(HostBlockId(host));
            }
        }
    }

    /// A block that is free again needs no content.
    fn cancel_load(&mut self, block: BlockId) {
        if let Some(at) = self.loads.iter().position(|&(_, target)| target == block) {
            let (host, _) = self.loads.swap_remove(at);
            self.host_free.push(host);
        }
    }

    pub fn take_copies(
        &mut self,
        saves: &mut Vec<(BlockId, HostBlockId)>,
        loads: &mut Vec<(HostBlockId, BlockId)>,
    ) {
        saves.append(&mut self.saves);
        loads.append(&mut self.loads);
    }

    pub fn loaded(&mut self, loads: &[(HostBlockId, BlockId)]) {
        let times =
            if planted(Bug::HostFreedEarly) { 0 } else { 1 + usize::from(planted(Bug::HostFreedTwice)) };
        (0..times).for_each(|_| self.host_free.extend(loads.iter().map(|&(host, _)| host)));
    }

    pub fn clear(&mut self) -> usize {
        let before = self.free.len();
        for block in 0..self.refs.len() as u32 {
            if self.index.is_registered(block) {
                self.index.forget(Place::Device(block));
                if self.cached.contains(block) {
                    self.cached.remove(block);
                    self.free.push(BlockId(block));
                    self.cancel_load(BlockId(block));
                }
            }
        }
        while let Some(host) = self.host_cached.pop() {
            self.index.forget(Place::Host(host));
            self.host_free.push(HostBlockId(host));
        }
        self.saves.clear();
        self.event(|| KvEvent::Cleared);
        self.free.len() - before
    }

    pub fn take_events(&mut self, events: &mut Vec<KvEvent>) {
        if let Some(own) = &mut self.events {
            events.append(own);
        }
    }

    pub fn snapshot(&self) -> Vec<KvEvent> {
        let stored = |(hash, parent, tokens): (_, _, &[TokenId])| KvEvent::Stored {
            hash,
            parent,
            tokens: tokens.to_vec(),
        };
        self.index.all().into_iter().map(stored).collect()
    }

    pub fn tokens_of(&self, block: BlockId) -> Option<&[TokenId]> {
        self.index.tokens_of(block.0)
    }

    pub fn references(&self, block: BlockId) -> usize {
        self.refs[block.0 as usize] as usize
    }

    pub fn is_consistent(&self) -> bool {
        let mut listed = vec![false; self.refs.len()];
        let unique = self.free.iter().all(|id| !std::mem::replace(&mut listed[id.0 as usize], true));
        let each = |block: u32| {
            let (free, cached) = (listed[block as usize], self.cached.contains(block));
            let (refs, registered) = (self.refs[block as usize], self.index.is_registered(block));
            match (free, cached) {
                (true, true) => false,
                (true, false) => refs == 0 && !registered,
                (false, true) => refs == 0 && registered && self.keep,
                (false, false) => refs > 0,
            }
        };
        unique && (0..self.refs.len() as u32).all(each) && self.index.is_consistent()
    }
}

/// What is there of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Probe {
    /// Blocks from the beginning.
    pub hits: usize,
    /// Blocks that must be taken for them out of `available`.
    pub taken: usize,
    /// Blocks that can be had, cached ones included.
    pub available: usize,
}
