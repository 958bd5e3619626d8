//! The KV cache as the kernels see it.
//!
//! One allocation per model, bf16 `[num_layers, num_blocks, 2, K, block_size, D]`: keys, then values. The tokens of a block
//! lie together for each head, so that attention reads 16 of them as one run of `32 * D` bytes.

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
    2 * shape.num_blocks * shape.num_kv_heads * shape.block_size * shape.head_dim
}

/// Elements of the whole cache.
pub fn kv_cache_elems(shape: &KvShape) -> usize {
    shape.num_layers * layer_elems(shape)
}

/// One layer of a paged KV cache in device memory.
#[derive(Clone, Copy)]
pub struct KvLayer<'a> {
    /// The whole cache: [`kv_cache_elems`] of bf16.
    pub cache: &'a DeviceBuffer,
    /// Its extents.
    pub shape: KvShape,
    /// Which layer.
    pub layer: usize,
}

impl KvLayer<'_> {
    /// Where the layer begins, once everything about it fits.
    pub(super) fn checked(&self, op: &'static str, heads: HeadShape) -> Result<DevPtr> {
        let KvLayer { cache, shape, layer } = self;
        if shape.dtype != DType::Bf16 {
            let detail = format!(
                "the KV cache holds {:?}; the CUDA kernels take bf16 (--kv-cache-dtype bfloat16)",
                shape.dtype
            );
            return Err(KernelError::Unsupported { op, detail });
        }
        if !shape.block_size.is_power_of_two() || !(16..=256).contains(&shape.block_size) {
            let detail = format!(
                "a block holds {} tokens; the CUDA kernels take powers of two from 16 to 256",
                shape.block_size
            );
            return Err(KernelError::Unsupported { op, detail });
        }
        let (got, expected) =
            ([shape.num_kv_heads, shape.head_dim, *layer], [heads.num_kv_heads, heads.head_dim]);
        if got[..2] != expected || *layer >= shape.num_layers {
            let expected = vec![expected[0], expected[1], shape.num_layers.saturating_sub(1)];
            return Err(KernelError::Shape {
                op,
                what: "kv (heads, head size, layer)".into(),
                got: got.to_vec(),
                expected,
            });
        }
        let base = cache.at_least(op, "kv", DType::Bf16, kv_cache_elems(shape))?;
        Ok(base.offset(layer * layer_elems(shape) * DType::Bf16.size()))
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
