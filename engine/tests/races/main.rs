//! Races between handles, readers and the engine thread, under shuttle, which chooses who goes on at every use of a lock, an atomic or
//! a channel: thousands of interleavings in seconds, and one that fails can be replayed.
//!
//! The engine's own modules run here, compiled over `sync.rs` of this folder: places in the queue, what is unread of a stream, and how the end
//! is announced; their own tests run here too. What stands around them, the engine thread's loop and a stream, is played by
//! `life.rs` in as few lines as the protocol has. Shuttle knows no weak memory: all orders are sequentially consistent here.

#![allow(clippy::unwrap_used)]

mod channel;
mod life;
mod sync;

#[allow(dead_code)]
#[path = "../../src/admission.rs"]
mod admission;
#[allow(dead_code)]
#[path = "../../src/queue.rs"]
mod queue;
#[path = "../../src/stopped.rs"]
mod stopped;
#[allow(dead_code)]
#[path = "../../src/unread.rs"]
mod unread;

/// What those modules name.
mod error {
    pub use tidemill_engine::{RequestError, StopReason};
}
