//! The CUDA backend: hand-written kernels (`kernels/cuda/*.cu`) behind one table, launched through a [`driver::Driver`].
//!
//! - [`driver`]: what a device must do; implemented over cudarc and by the emulator of the tests.
//! - [`gpu`]: a real GPU, over the CUDA driver API.
//! - [`table`]: the kernels and their signatures.
//! - [`memory`]: owned device memory; [`words`]: index tensors in it; [`matrix`]: matrices, quantised or not.
//! - [`ops`]: one file per op: checks its contract and launches.
//! - [`CudaOps`]: the decoder's ops over them; `decoder`: their bodies. `weights`: how weights get there; `steps`, `batch`, `layout`: how a step's metadata does, and
//!   how its results come back; `graphs`: which steps run from CUDA graphs.

mod batch;
mod cuda_ops;
mod decoder;
pub mod driver;
pub mod gpu;
mod graphs;
mod layout;
pub mod matrix;
pub mod memory;
pub mod ops;
mod steps;
pub mod table;
mod weights;
pub mod words;

use std::sync::Arc;

use half::bf16;

pub use self::{
    batch::CudaBatch,
    cuda_ops::CudaOps,
    decoder::{
        cache::{CudaHostKv, CudaKvCache},
        config::{CudaAttention, CudaConfig},
        experts::CudaRoutes,
        lora::CudaLora,
        step::CudaPending,
    },
    weights::{CudaExperts, CudaWeight, Uploader},
};
use self::{
    driver::{Driver, Pinned, Result},
    memory::{DeviceBuffer, PinnedMemory},
};
use crate::tensor::DType;

/// A device to run ops on: a handle to its driver.
#[derive(Clone)]
pub struct Device {
    driver: Arc<dyn Driver>,
}

impl Device {
    /// A device over a driver.
    pub fn new(driver: Arc<dyn Driver>) -> Self {
        Self { driver }
    }

    /// The driver.
    pub fn driver(&self) -> &dyn Driver {
        self.driver.as_ref()
    }

    /// Allocates an array, contents unspecified. `what` names it in the error.
    ///
    /// # Errors
    /// [`crate::KernelError::OutOfMemory`].
    pub fn buffer(&self, dtype: DType, elems: usize, what: &'static str) -> Result<DeviceBuffer> {
        DeviceBuffer::new(self.driver.clone(), dtype, elems, what)
    }

    /// Waits, and copies the first `elems` elements of an array to the host, as f32.
    ///
    /// # Errors
    /// What the driver reports; [`crate::KernelError::Shape`] when there are not as many.
    pub fn download(&self, buffer: &DeviceBuffer, elems: usize) -> Result<Vec<f32>> {
        let src = buffer.at_least("download", "buffer", buffer.dtype(), elems)?;
        let bytes = elems * buffer.dtype().size();
        let mut host = PinnedMemory::new(self.driver.clone(), bytes, Pinned::Readback)?;
        // SAFETY: both sides hold the bytes; nobody else knows the target, and it is read after the wait.
        unsafe { self.driver.copy_to_host(host.ptr(), src, bytes) }?;
        self.driver.synchronize()?;
        // SAFETY: the copy is over.
        let host: &[u8] = unsafe { host.bytes_mut() };
        Ok(match buffer.dtype() {
            DType::F32 => {
                host[..bytes].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            DType::F8E4M3 => host[..bytes].iter().map(|&b| crate::tensor::f8_to_f32(b)).collect(),
            // No device array holds f16.
            DType::F16 | DType::Bf16 => {
                host[..bytes].chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
        })
    }
}
