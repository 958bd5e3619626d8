//! Every CUDA kernel against its reference, executed on the CPU by the emulator under four schedules.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod harness;
mod planted;
mod rmsnorm;
mod signatures;
