//! A real GPU, over the CUDA driver API. With the rest of `crate::cuda`, the only place that knows cudarc.
//!
//! - [`open()`], [`devices`]: from an ordinal to a [`GpuDriver`], or a [`GpuError`] that says what to do.
//! - `stream`: [`GpuDriver`], the implementation of [`super::driver::Driver`].
//! - `images`: the kernels as machine code, embedded by the build or compiled here by `nvrtc` and kept by `cache`.
//! - `status`: what the driver answers, as errors.
//!
//! libcuda and libnvrtc are loaded when they are first needed, so one binary runs with and without a GPU.

mod cache;
mod error;
mod images;
pub mod nvrtc;
mod open;
mod status;
mod stream;

pub use error::{GpuError, Version};
pub use images::{KernelOrigin, compile_file};
pub use open::{GpuOptions, devices, open};
pub use stream::GpuDriver;
