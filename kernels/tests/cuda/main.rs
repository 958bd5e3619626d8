//! Every CUDA kernel against its reference, executed on the CPU by the emulator under four schedules.

#![allow(clippy::unwrap_used)]

mod attention;
#[path = "../common/mod.rs"]
mod common;
mod harness;
mod paged;
mod rmsnorm;
mod rope_kv_write;
mod signatures;
