//! The GPU driver, executed on a machine without a GPU: over a libcuda of our own (`kernels/emu/libcuda`), whose kernels run in the
//! emulator. Each test runs in a process of its own, as libraries and sticky errors are for life.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod fake;
mod images;
mod open;
mod stream;
