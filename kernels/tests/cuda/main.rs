//! Every CUDA kernel against its reference: on the CPU, by the emulator under four schedules, or on the GPU that
//! `TIDEMILL_TEST_DEVICE=cuda:N` names.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod harness;
mod probe;
mod rmsnorm;
mod signatures;
