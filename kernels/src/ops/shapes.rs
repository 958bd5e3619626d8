//! Extents of what ops work on.

#[allow(unused_imports)] // for links
use super::Ops;
use crate::tensor::DType;

/// Extents of a KV cache: for each layer, keys and values of `num_blocks * block_size` slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub num_layers: usize,
    /// Blocks, shared by all layers: a block id names the same place in each.
    pub num_blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// K.
    pub num_kv_heads: usize,
    /// D: elements of a key.
    pub head_dim: usize,
    /// Elements of a value: D, or 0 in the cache of latent attention, where the first elements of a key are its value.
    pub value_dim: usize,
    /// Storage type, [`DType::F32`], [`DType::Bf16`] or [`DType::F8E4M3`].
    pub dtype: DType,
}

impl KvShape {
    /// Bytes of one block over all layers, keys and values together.
    pub fn block_bytes(&self) -> usize {
        let token = self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype.size();
        self.num_layers * self.block_size * token
    }
}

/// One block of a KV cache to be copied, over all layers, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockCopy {
    /// From the cache to the host.
    Save {
        /// The block of the cache that is read.
        block: u32,
        /// The host block that is overwritten.
        host: u32,
    },
    /// From the host to the cache.
    Load {
        /// The host block that is read.
        host: u32,
        /// The block of the cache that is overwritten.
        block: u32,
    },
}

impl BlockCopy {
    /// The block of the cache, and the one of the host.
    pub(crate) fn ids(self) -> (usize, usize) {
        let (Self::Save { block, host } | Self::Load { host, block }) = self;
        (block as usize, host as usize)
    }

    /// The caller's side of [`Ops::copy_blocks`].
    pub(crate) fn check(copies: &[Self], kv: KvShape, host: KvShape) {
        let of_one_block = |shape: KvShape| KvShape { num_blocks: 1, ..shape };
        assert_eq!(of_one_block(kv), of_one_block(host), "host blocks of another cache");
        for copy in copies {
            let ids = copy.ids();
            assert!(
                ids.0 < kv.num_blocks && ids.1 < host.num_blocks,
                "{copy:?}: there are {} blocks, and {} on the host",
                kv.num_blocks,
                host.num_blocks
            );
        }
    }
}

/// Head layout of the fused `qkv` activation: `[T, (Q + 2 K) * D]`, queries first, then keys, then values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Q, a multiple of K.
    pub num_heads: usize,
    /// K.
    pub num_kv_heads: usize,
    /// D.
    pub head_dim: usize,
}

impl HeadShape {
    /// `(Q + 2 K) * D`.
    pub fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
}

/// Parts of a matrix's rows: in each row `groups` neighbouring parts of `width` elements, the first at `offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slices {
    /// Rows.
    pub rows: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// First element of the first part.
    pub offset: usize,
    /// Parts of a row.
    pub groups: usize,
    /// Elements of a part.
    pub width: usize,
}

/// Extents of latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), computed in its absorbed form: all query heads read one
/// key of L + R elements, whose first L are the value as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentShape {
    /// Q.
    pub num_heads: usize,
    /// L: elements of the compressed key and value.
    pub latent_dim: usize,
    /// R: elements that carry the position.
    pub rope_dim: usize,
}
