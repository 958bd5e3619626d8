//! What is measured on; see [`super::cuda`] for GPUs.

use std::{str::FromStr, time::Duration};

use tidemill_kernels::{
    Ops,
    cpu::{Compute, CpuConfig, CpuOps, probe},
    ops::HeadShape,
};

use super::{
    Error,
    clock::{Clock, WallClock},
    cuda::CudaMachine,
    limits::Bandwidth,
};

/// A device as the command line names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The GPU with this ordinal.
    Cuda(usize),
    /// The CPU.
    Cpu,
}

impl FromStr for Place {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match (name, name.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(ordinal)),
            _ => Err("cpu, cuda and cuda:N name devices".into()),
        }
    }
}

/// Sizes that ops are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// T of the largest step.
    pub max_tokens: usize,
    /// S of the largest step.
    pub max_rows: usize,
    /// Tokens of the longest context.
    pub max_model_len: usize,
    /// Heads of the model.
    pub heads: HeadShape,
    /// V.
    pub vocab: usize,
}

/// A machine.
pub trait Machine {
    /// Its ops.
    type Ops: Ops + 'static;

    /// Its name.
    fn name(&self) -> String;

    /// Bytes of its last cache: inputs are rotated past it.
    fn cache_bytes(&self) -> usize;

    /// Whether times on it mean anything.
    fn is_real(&self) -> bool;

    /// New ops for these sizes.
    ///
    /// # Errors
    /// When the device refuses them.
    fn ops(&self, sizes: Sizes) -> Result<Self::Ops, Error>;

    /// Its clock.
    fn clock(&self) -> &dyn Clock;

    /// The same machine, if it is a GPU: for ops that no other device has.
    fn as_cuda(&self) -> Option<&CudaMachine> {
        None
    }

    /// Measures its memory for about twice `budget`.
    ///
    /// # Errors
    /// What the device reports.
    fn bandwidth(&self, budget: Duration) -> Result<Bandwidth, Error>;
}

/// The CPU.
pub struct CpuMachine;

impl Machine for CpuMachine {
    type Ops = CpuOps;

    fn name(&self) -> String {
        "cpu".into()
    }

    fn cache_bytes(&self) -> usize {
        32 << 20
    }

    fn is_real(&self) -> bool {
        true
    }

    fn ops(&self, _sizes: Sizes) -> Result<CpuOps, Error> {
        Ok(CpuOps::new(CpuConfig { compute: Compute::Bf16, isa: None, threads: None })?)
    }

    fn clock(&self) -> &dyn Clock {
        &WallClock
    }

    fn bandwidth(&self, _budget: Duration) -> Result<Bandwidth, Error> {
        let threads = std::thread::available_parallelism()?.get();
        Ok(Bandwidth { read: probe::read_bandwidth(threads)?, copy: None })
    }
}
