//! The CUDA backend from its kernels to the engine, executed on the CPU by the emulator: above the driver it is the code of a GPU.

#![allow(clippy::unwrap_used)]

mod goldens;
