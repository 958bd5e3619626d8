//! What threads share state through. The modules that use it are compiled once more by `tests/races`, where these names stand for
//! primitives whose interleavings a test controls; so they name no other.

pub(crate) use std::sync::{
    OnceLock,
    atomic::{AtomicU64, AtomicUsize},
};
#[cfg(test)]
pub(crate) use std::{sync::mpsc, thread};

pub(crate) use parking_lot::Mutex;

/// Runs a test of such a module: once here, in many interleavings there.
#[cfg(test)]
pub(crate) fn interleave(test: impl Fn() + Send + Sync + 'static) {
    test();
}

/// How often a test of such a module does what it does between two threads, so that they meet.
#[cfg(test)]
pub(crate) const ROUNDS: usize = 20_000;
