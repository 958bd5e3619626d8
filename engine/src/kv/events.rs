//! What the prefix cache stores and drops, for routers that send requests to where their beginning is cached.

use std::fmt;

use crate::ids::TokenId;

/// Names a full block by everything up to its end: keyed BLAKE3 over the parent's hash and the block's tokens, from a root that
/// holds model, credential and salt.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 32]);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A change of the prefix cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvEvent {
    /// A block can be found from now on.
    Stored {
        /// The block.
        hash: BlockHash,
        /// The block before it; `None` for the first one.
        parent: Option<BlockHash>,
        /// `block_size` tokens.
        tokens: Vec<TokenId>,
    },
    /// A block cannot be found any more.
    Removed {
        /// The block.
        hash: BlockHash,
    },
    /// No block can be found any more.
    Cleared,
}

/// Changes in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvEventBatch {
    /// Rises by one from batch to batch of one engine, whoever watches.
    pub sequence: u64,
    /// Set on the first batch that a watcher gets: everything that is stored, instead of changes.
    pub is_snapshot: bool,
    /// What changed.
    pub events: Vec<KvEvent>,
}
