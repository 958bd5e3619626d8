//! The engine thread over a runner that the test holds by a string: aborts, deadlines, failures, drains, overload, slow readers, activity and
//! explanations at every stage.

#![allow(clippy::unwrap_used)]

mod activity;
mod admission;
mod embeddings;
mod explain;
mod kv;
mod readers;
mod requests;
mod rig;
