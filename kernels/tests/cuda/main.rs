//! Every CUDA kernel against its reference, executed on the CPU by the emulator under four schedules.

#![allow(clippy::unwrap_used)]

mod activation;
mod attention;
#[path = "../common/mod.rs"]
mod common;
mod harness;
mod layernorm;
mod linear;
mod moe;
mod paged;
mod planted;
mod rmsnorm;
mod rope_kv_write;
mod rows;
mod sampling;
mod signatures;
mod words;
