//! Keys and values of all layers.
//!
//! Per layer, block and key/value head: keys `[D, block_size]`, values `[block_size, D]`. With the tokens of a block innermost, a vector of
//! keys is a vector of scores, and no sum over D crosses lanes. The cache of latent attention has no values: they are read from the keys.

use super::buffer::Arena;
use crate::{
    error::KernelError,
    ops::{BlockCopy, KvShape, Result},
    tensor::DType,
};

/// The KV cache of a CPU device.
pub struct CpuKvCache {
    keys: Arena,
    values: Arena,
    pub(crate) shape: KvShape,
}

impl CpuKvCache {
    pub(crate) fn new(shape: KvShape) -> Result<CpuKvCache> {
        let unsupported = |detail: String| Err(KernelError::Unsupported { op: "kv_cache", detail });
        if !matches!(shape.dtype, DType::F32 | DType::Bf16 | DType::F8E4M3) {
            return unsupported(format!("no {:?} cache; choose F32, Bf16 or F8E4M3", shape.dtype));
        }
        if shape.head_dim == 0 || !shape.head_dim.is_multiple_of(2) || shape.head_dim > 1024 {
            return unsupported(format!(
                "head size {} is not an even number of at most 1024",
                shape.head_dim
            ));
        }
        if shape.block_size == 0 || shape.num_kv_heads == 0 {
            return unsupported("a block without slots or heads".to_owned());
        }
        if shape.value_dim != shape.head_dim && (shape.value_dim, shape.num_kv_heads) != (0, 1) {
            return unsupported(format!("values of {} elements beside such keys", shape.value_dim));
        }
        let bytes = |dim: usize| shape.num_layers * shape.num_blocks * block_bytes(shape, dim);
        Ok(CpuKvCache {
            keys: Arena::new("key cache", bytes(shape.head_dim))?,
            values: Arena::new("value cache", bytes(shape.value_dim))?,
            shape,
        })
    }

    /// Extents of the cache.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// The storage of keys and of values, in a layout of this device's choice: to poison or to compare it.
    pub fn storage_mut(&mut self) -> [&mut [u8]; 2] {
        [self.keys.as_mut_bytes(), self.values.as_mut_bytes()]
    }

    /// First byte of the keys and of the values of `layer`.
    pub(crate) fn layer(&self, layer: usize) -> [*const u8; 2] {
        let [keys, values] = self.layer_bytes(layer);
        // SAFETY: a layer lies inside both arenas.
        unsafe { [self.keys.as_ptr().add(keys * layer), self.values.as_ptr().add(values * layer)] }
    }

    /// First byte of the keys and of the values of `layer`, and the bytes of each.
    pub(crate) fn layer_mut(&mut self, layer: usize) -> [&mut [u8]; 2] {
        let [keys, values] = self.layer_bytes(layer);
        let keys = &mut self.keys.as_mut_bytes()[keys * layer..][..keys];
        [keys, &mut self.values.as_mut_bytes()[values * layer..][..values]]
    }

    /// Bytes of the keys and of the values of `layer`, and of every other.
    fn layer_bytes(&self, layer: usize) -> [usize; 2] {
        assert!(layer < self.shape.num_layers, "layer {layer} of {}", self.shape.num_layers);
        [self.keys.bytes(), self.values.bytes()].map(|bytes| bytes / self.shape.num_layers)
    }
}

/// Bytes of one block in one layer, of what has `dim` elements.
fn block_bytes(shape: KvShape, dim: usize) -> usize {
    shape.block_size * shape.num_kv_heads * dim * shape.dtype.size()
}

/// Blocks of a KV cache that are kept aside, in the layout of the cache.
pub struct CpuHostKv(CpuKvCache);

impl CpuHostKv {
    pub(crate) fn new(shape: KvShape) -> Result<CpuHostKv> {
        CpuKvCache::new(shape).map(CpuHostKv)
    }
}

/// `Ops::copy_blocks`.
pub(super) fn copy_blocks(kv: &mut CpuKvCache, host: &mut CpuHostKv, copies: &[BlockCopy]) {
    let host = &mut host.0;
    BlockCopy::check(copies, kv.shape, host.shape);
    for layer in 0..kv.shape.num_layers {
        let bytes = [kv.shape.head_dim, kv.shape.value_dim].map(|dim| block_bytes(kv.shape, dim));
        let storages = kv.layer_mut(layer).into_iter().zip(host.layer_mut(layer));
        for ((cache, host), bytes) in storages.zip(bytes) {
            for copy in copies {
                let (block, at) = copy.ids();
                let block = &mut cache[block * bytes..][..bytes];
                let host = &mut host[at * bytes..][..bytes];
                match copy {
                    BlockCopy::Save { .. } => host.copy_from_slice(block),
                    BlockCopy::Load { .. } => block.copy_from_slice(host),
                }
            }
        }
    }
}
