//! The emulator finds what it claims to find, computes what a GPU computes, and its driver keeps the driver's contract.

#![allow(clippy::unwrap_used)]

mod catalogue;
mod computes;
mod driver;
mod harness;
mod hopper;
