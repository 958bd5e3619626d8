//! Model folders, specifications and checkpoints, driven through files.

#![allow(clippy::unwrap_used)]

mod checkpoint;
mod embedding;
mod files;
mod generation;
mod rope;
mod spec;
mod weights;
