//! The KV cache as the kernels see it.
//!
//! One allocation per model, bf16 or F8E4M3 `[num_layers, num_blocks, 2, K, block_size, D]`: keys, then values. The tokens of a block
//! lie together for each head, so that attention reads 16 of them as one run of `32 * D` bytes, or `16 * D`. Latent attention has keys alone:
//! `[num_layers, num_blocks, block_size, L + R]`.

use crate::{
    DType, KernelError,
    cuda::{
        driver::{DevPtr, Result},
        memory::DeviceBuffer,
    },
    ops::{HeadShape, KvShape},
};

/// Elements of one layer.
pub(super) fn layer_elems(shape: &KvShape) -> usize {
    shape.num_blocks * shape.num_kv_heads * shape.block_size * (shape.head_dim + shape.value_dim)
}

/// Elements of the whole cache.
pub fn kv_cache_elems(shape: &KvShape) -> usize {
    shape.num_layers * layer_elems(shape)
}

/// One layer of a paged KV cache in device memory.
#[derive(Clone, Copy)]
pub struct KvLayer<'a> {
    /// The whole cache: [`kv_cache_elems`] of its type.
    pub cache: &'a DeviceBuffer,
    /// Its extents.
    pub shape: KvShape,
    /// Which layer.
    pub layer: usize,
}

/// Refuses caches that no kernel can take.
///
/// # Errors
/// [`KernelError::Unsupported`].
pub fn check_cache(op: &'static str, shape: &KvShape) -> Result<()> {
    let KvShape { num_kv_heads, head_dim, value_dim, block_size, dtype, .. } = *shape;
    let refused = |detail| Err(KernelError::Unsupported { op, detail });
    if !matches!(dtype, DType::Bf16 | DType::F8E4M3) {
        return refused(format!(
            "the KV cache is kept in bf16 or F8E4M3, not in {dtype:?} (use --device cpu)"
        ));
    }
    if dtype != DType::Bf16 && value_dim == 0 {
        return refused(format!(
            "the cache of latent attention is kept in bf16, not in {dtype:?} (use --kv-cache-dtype auto, or --device cpu)"
        ));
    }
    if !block_size.is_power_of_two() || !(16..=256).contains(&block_size) {
        return refused(format!(
            "a block holds {block_size} tokens; the CUDA kernels take powers of two from 16 to 256"
        ));
    }
    if value_dim != head_dim && (value_dim, num_kv_heads) != (0, 1) {
        return refused(format!(
            "{num_kv_heads} heads have keys of {head_dim} and values of {value_dim} elements (use --device cpu)"
        ));
    }
    Ok(())
}

impl KvLayer<'_> {
    /// Where the layer begins, once everything about it fits.
    pub(super) fn checked(&self, op: &'static str, heads: HeadShape) -> Result<DevPtr> {
        let HeadShape { num_kv_heads, head_dim, .. } = heads;
        self.checked_as(op, [num_kv_heads, head_dim, head_dim])
    }

    /// The same for the cache of latent attention, whose keys have `width` elements.
    pub(super) fn checked_latent(&self, op: &'static str, width: usize) -> Result<DevPtr> {
        self.checked_as(op, [1, width, 0])
    }

    fn checked_as(&self, op: &'static str, expected: [usize; 3]) -> Result<DevPtr> {
        let KvLayer { cache, shape, layer } = self;
        check_cache(op, shape)?;
        let got = [shape.num_kv_heads, shape.head_dim, shape.value_dim];
        if got != expected || *layer >= shape.num_layers {
            return Err(KernelError::Shape {
                op,
                what: "kv (heads, key size, value size, layer)".into(),
                got: [&got[..], &[*layer]].concat(),
                expected: [&expected[..], &[shape.num_layers.saturating_sub(1)]].concat(),
            });
        }
        let base = cache.at_least(op, "kv", shape.dtype, kv_cache_elems(shape))?;
        Ok(base.offset(layer * layer_elems(shape) * shape.dtype.size()))
    }

    /// Whether it is in F8E4M3, and not in bf16.
    pub(super) fn is_f8(&self) -> bool {
        self.shape.dtype == DType::F8E4M3
    }

    /// log2 of the block size.
    pub(super) fn block_shift(&self) -> i32 {
        self.shape.block_size.trailing_zeros() as i32
    }
}

/// Refuses head layouts that no kernel can take.
pub(super) fn check_heads(op: &'static str, heads: HeadShape) -> Result<()> {
    let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
    if num_kv_heads == 0 || num_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) || head_dim == 0 {
        let detail = format!(
            "{num_heads} query heads do not share {num_kv_heads} key/value heads of size {head_dim} evenly"
        );
        return Err(KernelError::Unsupported { op, detail });
    }
    Ok(())
}
