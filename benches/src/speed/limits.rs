//! What the machine could do at best, measured in the same run as everything that is compared with it.

use std::time::Duration;

use tidemill_kernels::{
    DType, KernelError,
    cuda::{
        Device,
        ops::{probe_copy_bandwidth, probe_read_bandwidth, probe_sums},
    },
};

use super::{clock::Clock, random::RandomTensors};

/// The bounds of a machine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Bytes per second to and from memory: the better of reading and copying.
    pub bandwidth: f64,
    /// Floating-point operations per second of the best matrix product.
    pub flops: f64,
}

impl Limits {
    /// Seconds below which nothing moves `bytes` bytes and does `flops` operations.
    pub fn floor(&self, bytes: f64, flops: f64) -> f64 {
        (bytes / self.bandwidth).max(flops / self.flops)
    }
}

/// Bytes per second of a GPU's memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bandwidth {
    /// Reading only.
    pub read: f64,
    /// Copying, bytes read and bytes written together; absent where it was not measured.
    pub copy: Option<f64>,
}

impl Bandwidth {
    /// The better of the two.
    pub fn best(&self) -> f64 {
        self.read.max(self.copy.unwrap_or(0.0))
    }

    /// Measures a device on arrays of `bytes` random bytes.
    ///
    /// # Errors
    /// What the device reports.
    pub fn of_device(
        device: &Device,
        clock: &dyn Clock,
        bytes: usize,
        budget: Duration,
    ) -> Result<Self, KernelError> {
        let mut source = device.buffer(DType::Bf16, bytes / 2, "bandwidth probe")?;
        let mut target = device.buffer(DType::Bf16, bytes / 2, "bandwidth probe")?;
        let mut sums = device.buffer(DType::F32, probe_sums(device), "bandwidth probe")?;
        // Zeros would be quicker than what memory holds otherwise.
        let pool = RandomTensors::new(bytes.min(64 << 20) / 2, 1.0).matrix(1, bytes.min(64 << 20) / 2);
        for at in (0..bytes).step_by(pool.data.len()) {
            let part = pool.data.len().min(bytes - at);
            // SAFETY: the part lies inside the buffer; pageable memory is read before the call returns.
            unsafe { device.driver().copy_to_device(source.ptr().offset(at), pool.data.as_ptr(), part)? };
        }
        let read = clock.seconds(&mut || probe_read_bandwidth(device, &mut sums, &source), budget)?;
        let copy = clock.seconds(
            &mut || {
                probe_copy_bandwidth(device, &mut target, &source)?;
                // And back, so that both ends are written.
                probe_copy_bandwidth(device, &mut source, &target)
            },
            budget,
        )?;
        Ok(Self { read: bytes as f64 / read, copy: Some(4.0 * bytes as f64 / copy) })
    }
}
