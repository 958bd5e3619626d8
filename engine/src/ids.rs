//! Newtype ids: each one stops a mix-up that a bare integer would allow.

use std::{fmt, sync::Arc};

/// The name of a client's request, chosen by the client or made by the server; the key of an abort.
///
/// Not a [`SeqId`]: one request with `n = 4` is scheduled as four sequences.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// Longest accepted id in bytes.
    pub const MAX_BYTES: usize = 256;

    /// Wraps a name as it came from the client.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// A fresh name for a request whose client gave none.
    pub fn random() -> Self {
        Self::new(format!("req-{:016x}", rand::random::<u64>()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A scheduled sequence, numbered in order of arrival and never reused: a late result for an aborted sequence can
/// never be taken for another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// A KV block. Not a slot: slot = block × block_size + offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// A block's place in host memory. Not a [`BlockId`]: that one is on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostBlockId(pub u32);

/// Who is served: the key of the fair queue. Not a credential: a gateway may speak for many tenants with one key. Empty for whoever says
/// nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(Arc<str>);

impl TenantId {
    /// Longest accepted name in bytes.
    pub const MAX_BYTES: usize = 256;

    /// Wraps a name as it came from the client.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TenantId {
    fn default() -> Self {
        Self::new("")
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A token of the model's vocabulary. Not a position and not a count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct TokenId(pub u32);

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A submission's own number: aborts by a dropped stream use it, so that they can never hit another request that carries the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Ticket(pub u64);
