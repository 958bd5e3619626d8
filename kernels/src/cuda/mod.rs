//! The CUDA backend: hand-written kernels (`kernels/cuda/*.cu`) behind one table, launched through a [`driver::Driver`].
//!
//! - [`driver`]: what a device must do; implemented over cudarc and by the emulator of the tests.
//! - [`gpu`]: a real GPU, over the CUDA driver API.
//! - [`table`]: the kernels and their signatures.
//! - [`memory`]: owned device memory; [`words`]: index tensors in it.
//! - [`ops`]: one file per op: checks its contract and launches.

pub mod driver;
pub mod gpu;
pub mod memory;
pub mod ops;
pub mod table;
pub mod words;

use std::sync::Arc;

use self::{
    driver::{Driver, Result},
    memory::DeviceBuffer,
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
}
