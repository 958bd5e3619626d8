//! Model folders, specifications and checkpoints, driven through files.

#![allow(clippy::unwrap_used)]

mod checkpoint;
mod embedding;
mod families;
mod files;
mod generation;
mod rope;
mod spec;
mod weights;
