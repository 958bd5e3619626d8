//! Every op of the Tidemill decoder: its contract ([`ops::Ops`]) and its implementations.
//!
//! This crate knows buffers, shapes and dtypes. It knows no sequences, no requests and no `config.json`.

pub mod cpu;
pub mod cuda;
pub mod error;
pub mod ops;
pub mod sampling;
pub mod tensor;

pub use error::KernelError;
pub use ops::Ops;
pub use tensor::{DType, HostTensor};
