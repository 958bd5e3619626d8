//! What the driver API answers, as errors of this crate.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};

use super::error::GpuError;
use crate::error::KernelError;

/// A call that failed: its name and the driver's answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failure {
    call: &'static str,
    code: CUresult,
}

/// Names the call that gave `code`, unless it succeeded.
pub(super) fn check(call: &'static str, code: CUresult) -> Result<(), Failure> {
    if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(Failure { call, code }) }
}

/// Calls a function of the driver API, by its name.
macro_rules! call {
    ($name:ident($($argument:expr),* $(,)?)) => {
        $crate::cuda::gpu::status::check(stringify!($name), ::cudarc::driver::sys::$name($($argument),*))
    };
}
pub(super) use call;

impl Failure {
    pub(super) fn is_out_of_memory(self) -> bool {
        self.code == CUresult::CUDA_ERROR_OUT_OF_MEMORY
    }

    pub(super) fn is_no_device(self) -> bool {
        self.code == CUresult::CUDA_ERROR_NO_DEVICE
    }

    /// Whether the driver documents that it will answer every later call of this process with the same error.
    ///
    /// Numbers, not names: a driver may be newer than the bindings. In order: deinitialised, uncorrectable ECC error, NVLink
    /// error, contained error; illegal address, launch timeout, context destroyed, assertion; hardware stack error, illegal
    /// instruction, misaligned address, invalid address space, invalid program counter, launch failure; tensor memory leak;
    /// MPS server gone; external device, unknown. Invalid context (201) is what calls get after a reset of the device.
    fn is_sticky(self) -> bool {
        matches!(self.code as u32, 4 | 201 | 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 805..=807 | 911 | 999)
    }

    /// The error's name and NVIDIA's sentence about it.
    fn detail(self) -> String {
        let text = |ask: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
            let mut text = std::ptr::null();
            // SAFETY: writes one pointer, to a string that lives as long as the driver, or null.
            let status = unsafe { ask(self.code, &mut text) };
            if status != CUresult::CUDA_SUCCESS || text.is_null() {
                return format!("error {}", self.code as u32);
            }
            // SAFETY: not null, so it ends with a NUL and is never freed.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        format!("{}, {}", text(sys::cuGetErrorName), text(sys::cuGetErrorString))
    }
}

impl From<Failure> for KernelError {
    fn from(failure: Failure) -> Self {
        let (call, detail) = (failure.call, failure.detail());
        if failure.is_sticky() {
            KernelError::DeviceLost { call, detail }
        } else {
            KernelError::Device { call, detail }
        }
    }
}

impl From<Failure> for GpuError {
    fn from(failure: Failure) -> Self {
        if failure.is_out_of_memory() {
            GpuError::OutOfMemory { what: failure.call }
        } else if failure.is_no_device() {
            GpuError::NoDevice
        } else {
            GpuError::Driver { call: failure.call, detail: failure.detail() }
        }
    }
}
