//! A loaded adapter, as far as everybody but the model needs to know it.

use std::{any::Any, fmt, sync::Arc};

/// An adapter, numbered in order of loading and never reused: what is loaded under the name of one that went is another, and shares no cached
/// prefix with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u64);

/// A place for an adapter on the device. Not an [`AdapterId`]: a slot holds one adapter after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterSlot(pub u32);

/// A loaded adapter. It lives until it is unloaded and the last request that named it has ended.
#[derive(Clone)]
pub struct Adapter {
    /// Which it is.
    pub id: AdapterId,
    /// The name that clients use for it.
    pub name: Arc<str>,
    /// What the runner puts on the device. Nobody else looks inside.
    pub weights: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter").field("id", &self.id).field("name", &self.name).finish_non_exhaustive()
    }
}

impl PartialEq for Adapter {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}
