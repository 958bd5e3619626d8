//! `probe.cu`.

use crate::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::DeviceBuffer,
        table::kernels,
    },
};

kernels! {
    file "probe";
    /// Reads everything once.
    fn probe_read(sums: DevPtr, data: DevPtr, count: u64);
    /// Copies.
    fn probe_copy(dst: DevPtr, src: DevPtr, count: u64);
}

const OP: &str = "probe";
const THREADS: u32 = 256;
const WARPS: usize = THREADS as usize / 32;
/// Fills an SM: 2048 threads.
const BLOCKS_PER_SM: u32 = 8;
/// Bytes of one access.
const WORD: usize = 16;

/// Elements of the f32 buffer that [`probe_read_bandwidth`] writes.
pub fn probe_sums(device: &Device) -> usize {
    blocks(device) as usize * WARPS
}

/// Queues one reading of all of `data`, whose bytes are a multiple of 16. `sums`, at least [`probe_sums`] elements, receives
/// bits, not numbers: for each warp the exclusive or of all 32-bit words that it read.
///
/// # Errors
/// A buffer of another size or type; what the driver reports.
pub fn probe_read_bandwidth(device: &Device, sums: &mut DeviceBuffer, data: &DeviceBuffer) -> Result<()> {
    let count = words(data)?;
    let sums = sums.at_least(OP, "sums", DType::F32, probe_sums(device))?;
    let config = LaunchConfig::linear(blocks(device) as usize, THREADS);
    // SAFETY: the kernel reads `count` words of 16 bytes, all of `data`; `sums` has one element per warp.
    unsafe { probe_read(device.driver(), config, sums, data.ptr(), count) }
}

/// Queues a copy of all of `src`, whose bytes are a multiple of 16, to `dst`, which has the same type and size.
///
/// # Errors
/// Buffers of other sizes; what the driver reports.
pub fn probe_copy_bandwidth(device: &Device, dst: &mut DeviceBuffer, src: &DeviceBuffer) -> Result<()> {
    let count = words(src)?;
    let dst = dst.at_least(OP, "dst", src.dtype(), src.elems())?;
    let config = LaunchConfig::linear(blocks(device) as usize, THREADS);
    // SAFETY: both buffers hold `count` words of 16 bytes, and `&mut` says that they are apart.
    unsafe { probe_copy(device.driver(), config, dst, src.ptr(), count) }
}

fn blocks(device: &Device) -> u32 {
    device.driver().info().num_sms * BLOCKS_PER_SM
}

fn words(buffer: &DeviceBuffer) -> Result<u64> {
    let bytes = buffer.elems() * buffer.dtype().size();
    if bytes == 0 || !bytes.is_multiple_of(WORD) {
        let detail = format!("the probe reads words of {WORD} bytes; the buffer holds {bytes} bytes");
        return Err(KernelError::Unsupported { op: OP, detail });
    }
    Ok((bytes / WORD) as u64)
}
