//! The prefix index: which full blocks are there, by everything up to their end.
//!
//! A block is found by the hash of its chain ([`BlockHash`]), and what is found is then compared: its tokens, and that the block before it in its
//! chain is the very one that was found before. So a collision of hashes, or a chain whose beginning was given up and computed
//! anew by somebody else, is a miss and never another's keys and values.

use rustc_hash::{FxBuildHasher, FxHashMap};

use super::BlockHash;
use crate::{
    ids::TokenId,
    planted::{Bug, planted},
};

/// One registration of a block; never reused. 0 is the beginning of every chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeId(u64);

impl NodeId {
    pub const ROOT: Self = Self(0);
}

/// Where the keys and values of a registered block are: a number of the device's blocks, or of the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Device(u32),
    Host(u32),
}

/// A registered block.
#[derive(Debug, Clone, Copy)]
struct Node {
    id: NodeId,
    /// The block before it.
    parent: NodeId,
    hash: BlockHash,
    parent_hash: Option<BlockHash>,
    /// The beginning of its chain: model, credential, salt.
    root: BlockHash,
}

/// What a chain is at one of its blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link<'a> {
    pub root: BlockHash,
    pub parent: NodeId,
    pub parent_hash: Option<BlockHash>,
    pub hash: BlockHash,
    pub tokens: &'a [TokenId],
}

/// The nodes of one kind of memory, with their tokens side by side.
#[derive(Debug)]
struct Shelf {
    nodes: Vec<Option<Node>>,
    tokens: Vec<TokenId>,
}

impl Shelf {
    fn new(blocks: usize, block_size: usize) -> Self {
        Self { nodes: vec![None; blocks], tokens: vec![TokenId(0); blocks * block_size] }
    }
}

/// All registered blocks.
#[derive(Debug)]
pub(super) struct PrefixIndex {
    key: [u8; 32],
    block_size: usize,
    by_hash: FxHashMap<BlockHash, Place>,
    device: Shelf,
    host: Shelf,
    last: u64,
    /// Bytes of one block's tokens, kept for their memory.
    bytes: Vec<u8>,
}

impl PrefixIndex {
    pub fn new(key: [u8; 32], block_size: usize, device_blocks: usize, host_blocks: usize) -> Self {
        // It never grows: there are no more entries than blocks, and with twice the room the map clears away what removals leave behind
        // without moving.
        let room = 2 * (device_blocks + host_blocks);
        Self {
            key,
            block_size,
            by_hash: FxHashMap::with_capacity_and_hasher(room, FxBuildHasher),
            device: Shelf::new(device_blocks, block_size),
            host: Shelf::new(host_blocks, block_size),
            last: NodeId::ROOT.0,
            bytes: Vec::new(),
        }
    }

    /// The beginning of a chain that is told apart by these values.
    pub fn root(&self, parts: &[&[u8]]) -> BlockHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        for part in &parts[..if planted(Bug::SaltIgnored) { 1 } else { parts.len() }] {
            // With their lengths: two parts never read as one.
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        BlockHash(*hasher.finalize().as_bytes())
    }

    /// The hash of a block after `before`: its parent, or the root.
    pub fn hash(&mut self, before: BlockHash, tokens: &[TokenId]) -> BlockHash {
        self.bytes.clear();
        self.bytes.extend(tokens.iter().flat_map(|token| token.0.to_le_bytes()));
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        let hash = BlockHash(*hasher.update(&before.0).update(&self.bytes).finalize().as_bytes());
        if has_weak_hash() { BlockHash([hash.0[0] % 4; 32]) } else { hash }
    }

    fn shelf(&self, place: Place) -> (&Shelf, usize) {
        match place {
            Place::Device(block) => (&self.device, block as usize),
            Place::Host(block) => (&self.host, block as usize),
        }
    }

    fn node(&self, place: Place) -> Option<&Node> {
        let (shelf, block) = self.shelf(place);
        shelf.nodes[block].as_ref()
    }

    fn tokens(&self, place: Place) -> &[TokenId] {
        let (shelf, block) = self.shelf(place);
        &shelf.tokens[block * self.block_size..][..self.block_size]
    }

    /// The block of this link, if it is there.
    pub fn find(&self, link: Link) -> Option<(NodeId, Place)> {
        let place = *self.by_hash.get(&link.hash)?;
        let node = self.node(place).expect("what the index names is there");
        let beginning =
            (node.root == link.root && node.parent == link.parent) || planted(Bug::BeginningNotCompared);
        let same = beginning && (self.tokens(place) == link.tokens || planted(Bug::TokensNotCompared));
        same.then_some((node.id, place))
    }

    /// Registers a block of the device. Whatever was there under its hash, and is not the same chain, is to be forgotten first: it is returned
    /// and nothing has happened.
    pub fn insert(&mut self, link: Link, block: u32) -> Result<NodeId, Place> {
        if let Some(&other) = self.by_hash.get(&link.hash) {
            return Err(other);
        }
        debug_assert!(!self.is_registered(block), "a block is registered once");
        self.last += 1;
        let id = NodeId(self.last);
        let Link { root, parent, parent_hash, hash, tokens } = link;
        self.device.nodes[block as usize] = Some(Node { id, parent, hash, parent_hash, root });
        self.device.tokens[block as usize * self.block_size..][..self.block_size].copy_from_slice(tokens);
        self.by_hash.insert(hash, Place::Device(block));
        Ok(id)
    }

    /// Forgets a registered block.
    pub fn forget(&mut self, place: Place) -> BlockHash {
        let shelf = match place {
            Place::Device(_) => &mut self.device,
            Place::Host(_) => &mut self.host,
        };
        let (Place::Device(block) | Place::Host(block)) = place;
        let node = shelf.nodes[block as usize].take().expect("only what is registered is forgotten");
        self.by_hash.remove(&node.hash);
        node.hash
    }

    /// Notes that the keys and values of a registered block are elsewhere from now on.
    pub fn relocate(&mut self, from: Place, to: Place) {
        let mut node = None;
        let (source, target) = match (from, to) {
            (Place::Device(source), Place::Host(target)) => {
                std::mem::swap(&mut node, &mut self.device.nodes[source as usize]);
                (source, target)
            }
            (Place::Host(source), Place::Device(target)) => {
                std::mem::swap(&mut node, &mut self.host.nodes[source as usize]);
                (source, target)
            }
            _ => unreachable!("blocks move between device and host"),
        };
        let node = node.expect("only what is registered moves");
        let (source, target) = (source as usize * self.block_size, target as usize);
        let size = self.block_size;
        let (read, write) = match to {
            Place::Host(_) => (&self.device.tokens, &mut self.host),
            Place::Device(_) => (&self.host.tokens, &mut self.device),
        };
        write.tokens[target * size..][..size].copy_from_slice(&read[source..][..size]);
        write.nodes[target] = Some(node);
        self.by_hash.insert(node.hash, to);
    }

    pub fn is_registered(&self, block: u32) -> bool {
        self.device.nodes[block as usize].is_some()
    }

    /// All registered blocks: hash, parent and tokens, each after its parent where that is registered too.
    pub fn all(&self) -> Vec<(BlockHash, Option<BlockHash>, &[TokenId])> {
        let mut nodes: Vec<(u64, Place)> = self
            .by_hash
            .values()
            .map(|&place| (self.node(place).expect("what the index names is there").id.0, place))
            .collect();
        // A parent is registered before its children.
        nodes.sort_unstable_by_key(|&(id, _)| id);
        let entry = |(_, place)| {
            let node = self.node(place).expect("what the index names is there");
            (node.hash, node.parent_hash, self.tokens(place))
        };
        nodes.into_iter().map(entry).collect()
    }

    /// Tokens of a registered block of the device.
    pub fn tokens_of(&self, block: u32) -> Option<&[TokenId]> {
        self.is_registered(block).then(|| self.tokens(Place::Device(block)))
    }

    /// Whether the map and the nodes name each other.
    pub fn is_consistent(&self) -> bool {
        let named =
            |place: Place| self.node(place).is_some_and(|node| self.by_hash.get(&node.hash) == Some(&place));
        let nodes = self.device.nodes.iter().chain(&self.host.nodes).flatten().count();
        nodes == self.by_hash.len() && self.by_hash.values().all(|&place| named(place))
    }
}

/// Without planted bugs: `false`.
fn has_weak_hash() -> bool {
    [Bug::WeakHash, Bug::TokensNotCompared, Bug::BeginningNotCompared].into_iter().any(planted)
}
