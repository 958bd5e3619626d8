//! A GPU as a machine to measure on, or the emulator in its place.

use std::{sync::Arc, time::Duration};

use tidemill_kernels::cuda::{
    CudaAttention, CudaConfig, CudaOps, Device,
    driver::Driver,
    gpu::{self, GpuOptions},
};

use super::{
    Error,
    clock::{Clock, DeviceClock},
    limits::Bandwidth,
    machine::{Machine, Sizes},
    steps::BLOCK_SIZE,
};

/// A GPU, or what poses as one.
pub struct CudaMachine {
    driver: Arc<dyn Driver>,
    clock: DeviceClock,
    is_real: bool,
}

impl CudaMachine {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn open(ordinal: usize) -> Result<Self, Error> {
        Self::over(Arc::new(gpu::open(ordinal, &GpuOptions::default())?), true)
    }

    /// A machine over a driver; `is_real` says whether its times mean anything.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn over(driver: Arc<dyn Driver>, is_real: bool) -> Result<Self, Error> {
        let clock = DeviceClock::new(driver.clone())?;
        Ok(Self { driver, clock, is_real })
    }

    /// Its driver.
    pub fn driver(&self) -> Arc<dyn Driver> {
        self.driver.clone()
    }
}

impl Machine for CudaMachine {
    type Ops = CudaOps;

    fn name(&self) -> String {
        self.driver.info().name.clone()
    }

    fn cache_bytes(&self) -> usize {
        self.driver.info().l2_bytes
    }

    fn is_real(&self) -> bool {
        self.is_real
    }

    fn ops(&self, sizes: Sizes) -> Result<CudaOps, Error> {
        let Sizes { max_tokens, max_rows, max_model_len, heads, vocab } = sizes;
        let config = CudaConfig {
            max_tokens,
            max_rows,
            max_model_len,
            block_size: BLOCK_SIZE,
            attention: CudaAttention::causal(heads),
            vocab,
            graphs: true,
        };
        Ok(CudaOps::new(Device::new(self.driver.clone()), config)?)
    }

    fn clock(&self) -> &dyn Clock {
        &self.clock
    }

    fn as_cuda(&self) -> Option<&CudaMachine> {
        Some(self)
    }

    fn bandwidth(&self, budget: Duration) -> Result<Bandwidth, Error> {
        let bytes = if self.is_real { 2 << 30 } else { 1 << 20 };
        Ok(Bandwidth::of_device(&Device::new(self.driver.clone()), &self.clock, bytes, budget)?)
    }
}
