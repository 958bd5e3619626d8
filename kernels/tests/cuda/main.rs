//! Every CUDA kernel against its reference: on the CPU, by the emulator under four schedules, or on the GPU that
//! `TIDEMILL_TEST_DEVICE=cuda:N` names.

#![allow(clippy::unwrap_used)]

mod activation;
#[path = "../common/adapters.rs"]
mod adapters;
mod attention;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/states.rs"]
mod common_states;
#[path = "../common/copies.rs"]
mod copies;
mod copy_blocks;
mod decoder;
mod f8_cache;
mod harness;
mod latent;
mod linear;
mod lora;
mod moe;
mod moe_route;
mod norm;
mod paged;
mod planted;
mod probe;
mod quantized;
mod rope_kv_write;
mod rows;
mod sampling;
mod signatures;
mod states;
mod words;
