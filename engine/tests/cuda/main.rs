//! The CUDA backend from its kernels to the engine: on the CPU, by the emulator (above the driver it is the code of a GPU), or on
//! the GPU that `TIDEMILL_TEST_DEVICE=cuda:N` names.

#![allow(clippy::unwrap_used)]

mod device;
mod engine;
mod goldens;
mod swap;
