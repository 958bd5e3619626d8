//! Every CUDA kernel against its reference: on the CPU, by the emulator under four schedules, or on the GPU that
//! `TIDEMILL_TEST_DEVICE=cuda:N` names.

#![allow(clippy::unwrap_used)]

mod activation;
#[path = "../common/mod.rs"]
mod common;
mod harness;
mod probe;
mod layernorm;
mod linear;
mod moe;
mod planted;
mod rmsnorm;
mod rows;
mod sampling;
mod attention;
mod paged;
mod rope_kv_write;
mod signatures;
mod words;
