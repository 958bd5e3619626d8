//! The KV cache, and its blocks on the host.

use crate::{
    cuda::{
        CudaOps, Device,
        driver::{Pinned, Result},
        memory::{DeviceBuffer, PinnedMemory},
        ops::{CopyBlocks, check_cache, copy_blocks as queue_copies, kv_cache_elems},
    },
    ops::{BlockCopy, KvShape},
};

/// Keys and values of all layers.
pub struct CudaKvCache {
    pub(super) cache: DeviceBuffer,
    pub(super) shape: KvShape,
}

impl CudaKvCache {
    /// The storage, in the layout of [`crate::cuda::ops::KvLayer`]: to fill or to compare it.
    pub fn storage(&self) -> &DeviceBuffer {
        &self.cache
    }
}

/// Blocks of a KV cache in page-locked host memory, which copies on the stream alone touch.
pub struct CudaHostKv {
    memory: PinnedMemory,
    shape: KvShape,
    device: Device,
}

impl Drop for CudaHostKv {
    fn drop(&mut self) {
        // Copies that are queued end first. A lost device runs nothing any more.
        let _ = self.device.driver().synchronize();
    }
}

pub(in crate::cuda) fn kv_cache(ops: &CudaOps, shape: KvShape) -> Result<CudaKvCache> {
    // Graphs were recorded with the one before.
    let mut steps = ops.steps.lock();
    ops.device.driver().synchronize()?;
    steps.graphs.clear();
    check_cache("kv_cache", &shape)?;
    let cache = ops.device.buffer(shape.dtype, kv_cache_elems(&shape), "the KV cache")?;
    Ok(CudaKvCache { cache, shape })
}

pub(in crate::cuda) fn host_kv(ops: &CudaOps, shape: KvShape) -> Result<CudaHostKv> {
    check_cache("host_kv", &shape)?;
    let bytes = shape.num_blocks * shape.block_bytes();
    let memory = PinnedMemory::new(ops.device.driver.clone(), bytes, Pinned::Readback)?;
    Ok(CudaHostKv { memory, shape, device: ops.device.clone() })
}

pub(in crate::cuda) fn copy_blocks(
    ops: &CudaOps,
    kv: &CudaKvCache,
    host: &CudaHostKv,
    copies: &[BlockCopy],
) -> Result<()> {
    let CudaKvCache { cache, shape } = kv;
    let call = CopyBlocks { cache, shape: *shape, host: &host.memory, host_shape: host.shape, copies };
    queue_copies(&ops.device, call)
}
