//! Why a GPU could not be opened.

use std::fmt;

/// A CUDA version, as NVIDIA counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Images run on every driver of the same major version or a newer one.
    pub major: u32,
    /// PTX runs on drivers of the same version or a newer one.
    pub minor: u32,
}

impl Version {
    /// From the driver API's `1000 * major + 10 * minor`.
    pub(super) fn from_driver(number: i32) -> Self {
        let number = number.unsigned_abs();
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A GPU could not be opened. Each message is one sentence that ends with what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// libcuda cannot be loaded.
    #[error(
        "no NVIDIA driver was found (libcuda.so.1 cannot be loaded): install the driver, or use --device cpu"
    )]
    NoDriver,
    /// The driver runs no kernels of this binary's CUDA version, and no NVRTC of an older one was found.
    #[error(
        "the NVIDIA driver supports CUDA {found}, but the kernels need CUDA {needed}: update the driver to release {} or \
         newer{}, or use --device cpu", release(.needed), older_nvrtc(.found)
    )]
    DriverTooOld {
        /// What the driver supports.
        found: Version,
        /// What the images in this binary, or the calls of this crate, need.
        needed: Version,
    },
    /// The driver lists no GPU.
    #[error(
        "the NVIDIA driver lists no GPU: see what nvidia-smi says and whether CUDA_VISIBLE_DEVICES hides it, or use \
         --device cpu"
    )]
    NoDevice,
    /// There are GPUs, but not this many.
    #[error("there is no GPU {ordinal}: {}; name one that exists, or use --device cpu", numbered(.count))]
    BadOrdinal {
        /// The one that was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The GPU is older than the kernels' instructions.
    #[error(
        "{name} has compute capability {}.{}, but the kernels need 8.0 or newer (Ampere): choose another GPU, or use \
         --device cpu", .capability.0, .capability.1
    )]
    UnsupportedDevice {
        /// The vendor's name for it.
        name: String,
        /// Compute capability.
        capability: (u32, u32),
    },
    /// No images in the binary, and no compiler to make them.
    #[error(
        "this binary was built without nvcc and libnvrtc, which would compile its kernels now, was not found: run \
         `pip install {}`, rebuild where nvcc is installed, or use --device cpu", nvrtc_package(.driver)
    )]
    NvrtcMissing {
        /// What the driver supports, and so which NVRTC fits.
        driver: Version,
    },
    /// libnvrtc was found and cannot be used.
    #[error("libnvrtc cannot be used ({detail}): run `pip install nvidia-cuda-nvrtc`, or use --device cpu")]
    NvrtcUnusable {
        /// What went wrong.
        detail: String,
    },
    /// NVRTC is older than the GPU.
    #[error(
        "NVRTC {version} does not know {arch}, the architecture of this GPU: run `pip install --upgrade \
         nvidia-cuda-nvrtc`, or use --device cpu"
    )]
    NvrtcTooOld {
        /// Its version.
        version: Version,
        /// The target it was asked for.
        arch: String,
    },
    /// A kernel file does not compile.
    #[error("NVRTC refused {file} for {arch}: report this with the log, or use --device cpu\n{log}")]
    Compile {
        /// The kernel file.
        file: String,
        /// The target.
        arch: String,
        /// What the compiler said.
        log: String,
    },
    /// No room for the context, the kernels or the stream.
    #[error(
        "the GPU has no memory left for {what}: end what else runs on it (nvidia-smi), or use --device cpu"
    )]
    OutOfMemory {
        /// The call that needed it.
        what: &'static str,
    },
    /// Another call failed.
    #[error("the GPU cannot be used ({call}: {detail}): see what nvidia-smi says, or use --device cpu")]
    Driver {
        /// The call.
        call: &'static str,
        /// What the driver said.
        detail: String,
    },
}

fn numbered(count: &usize) -> String {
    match count {
        1 => "the driver lists one, number 0".into(),
        _ => format!("the driver lists {count}, numbered from 0"),
    }
}

/// The first release of the driver for a CUDA version (CUDA Compatibility, "Minor version compatibility").
fn release(needed: &Version) -> &'static str {
    if needed.major < 13 { "525" } else { "580" }
}

/// What helps beside a newer driver: kernels that are compiled for the older one.
fn older_nvrtc(found: &Version) -> &'static str {
    if found.major == 12 { ", or run `pip install nvidia-cuda-nvrtc-cu12`" } else { "" }
}

/// The name of the Python package that holds the NVRTC for a driver.
fn nvrtc_package(driver: &Version) -> &'static str {
    if driver.major < 13 { "nvidia-cuda-nvrtc-cu12" } else { "nvidia-cuda-nvrtc" }
}
