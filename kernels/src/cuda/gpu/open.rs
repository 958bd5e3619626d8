//! Finding a GPU.

use std::{ffi::CStr, path::PathBuf};

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute};

use super::{
    error::{GpuError, Version},
    images,
    status::call,
    stream::GpuDriver,
};
use crate::cuda::driver::DeviceInfo;

/// The oldest CUDA version whose driver has every call that is made here.
const OLDEST_DRIVER: Version = Version { major: 12, minor: 0 };
/// The oldest compute capability whose instructions the kernels use: `cp.async`, bf16 `mma`.
const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// How a GPU is opened.
#[derive(Debug, Clone, Default)]
pub struct GpuOptions {
    /// Where NVRTC's images are kept between starts; `None` compiles anew at each start. Unused with embedded images.
    pub cache_dir: Option<PathBuf>,
}

/// Every GPU that the driver lists, in its order: what `ordinal` counts in [`open`].
///
/// # Errors
/// [`GpuError::NoDriver`], [`GpuError::DriverTooOld`], [`GpuError::NoDevice`], [`GpuError::Driver`].
pub fn devices() -> Result<Vec<DeviceInfo>, GpuError> {
    driver_version()?;
    let mut count = 0;
    // SAFETY: initialises the library; writes one number.
    unsafe {
        call!(cuInit(0))?;
        call!(cuDeviceGetCount(&mut count))?;
    }
    if count <= 0 {
        return Err(GpuError::NoDevice);
    }
    (0..count).map(|ordinal| describe(handle(ordinal)?)).collect()
}

/// Opens GPU `ordinal` and loads the kernels on it.
///
/// # Errors
/// All of [`GpuError`].
pub fn open(ordinal: usize, options: &GpuOptions) -> Result<GpuDriver, GpuError> {
    let version = driver_version()?;
    let mut devices = devices()?;
    if ordinal >= devices.len() {
        return Err(GpuError::BadOrdinal { ordinal, count: devices.len() });
    }
    let info = devices.swap_remove(ordinal);
    if info.compute_capability < OLDEST_CAPABILITY {
        return Err(GpuError::UnsupportedDevice { name: info.name, capability: info.compute_capability });
    }
    let (images, origin) =
        images::for_device(info.compute_capability, version, options.cache_dir.as_deref())?;
    GpuDriver::new(handle(ordinal as i32)?, info, &images, origin)
}

/// What the driver supports, if there is one and it is new enough to be asked anything else.
fn driver_version() -> Result<Version, GpuError> {
    // SAFETY: loads and unloads libcuda, whose initialisers touch nothing of ours. Asked first, as every other call of cudarc
    // panics when the library is missing.
    if !unsafe { sys::is_culib_present() } {
        return Err(GpuError::NoDriver);
    }
    let mut number = 0;
    // SAFETY: writes one number; needs no initialisation.
    unsafe { call!(cuDriverGetVersion(&mut number)) }?;
    let found = Version::from_driver(number);
    if found < OLDEST_DRIVER {
        return Err(GpuError::DriverTooOld { found, needed: OLDEST_DRIVER });
    }
    Ok(found)
}

fn handle(ordinal: i32) -> Result<CUdevice, GpuError> {
    let mut device = 0;
    // SAFETY: writes one handle.
    unsafe { call!(cuDeviceGet(&mut device, ordinal)) }?;
    Ok(device)
}

fn describe(device: CUdevice) -> Result<DeviceInfo, GpuError> {
    use CUdevice_attribute as Attribute;
    let attribute = |which| -> Result<usize, GpuError> {
        let mut value = 0;
        // SAFETY: writes one number.
        unsafe { call!(cuDeviceGetAttribute(&mut value, which, device)) }?;
        Ok(usize::try_from(value).unwrap_or(0))
    };
    let mut name = [0_u8; 256];
    let mut total_memory = 0;
    // SAFETY: the array has the length given, the rest writes one number.
    unsafe {
        call!(cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device))?;
        call!(cuDeviceTotalMem_v2(&mut total_memory, device))?;
    }
    let name = CStr::from_bytes_until_nul(&name).map(CStr::to_string_lossy).unwrap_or_default().into_owned();
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32;
    Ok(DeviceInfo {
        name,
        compute_capability: (major, minor),
        num_sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        total_memory,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        max_shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}
