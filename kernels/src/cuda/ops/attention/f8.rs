//! `attention_f8.cu`.

use super::{AttentionArgs, Launcher};
use crate::cuda::table::kernels;

kernels! {
    file "attention_f8";
    /// A warp per item: 16 query rows, D = 16.
    fn attention_split_16_f8(args: AttentionArgs);
    /// A block per item: 64 query rows, D = 16.
    fn attention_block_16_f8(args: AttentionArgs);
    /// A warp per item: 16 query rows, D = 32.
    fn attention_split_32_f8(args: AttentionArgs);
    /// A block per item: 64 query rows, D = 32.
    fn attention_block_32_f8(args: AttentionArgs);
    /// A warp per item: 16 query rows, D = 64.
    fn attention_split_64_f8(args: AttentionArgs);
    /// A block per item: 64 query rows, D = 64.
    fn attention_block_64_f8(args: AttentionArgs);
    /// A warp per item: 16 query rows, D = 80.
    fn attention_split_80_f8(args: AttentionArgs);
    /// A block per item: 64 query rows, D = 80.
    fn attention_block_80_f8(args: AttentionArgs);
    /// A warp per item: 16 query rows, D = 96.
    fn attention_split_96_f8(args: AttentionArgs);
    /// A block per item: 64 query rows, D = 96.
    fn attention_block_96_f8(args: AttentionArgs);
    /// A warp per item: 16 query rows, D = 128.
    fn attention_split_128_f8(args: AttentionArgs);
    /// A block per item: 64 query rows, D = 128.
    fn attention_block_128_f8(args: AttentionArgs);
    /// A warp per item: 16 query rows, D = 192.
    fn attention_split_192_f8(args: AttentionArgs);
    /// A block per item: 64 query rows, D = 192.
    fn attention_block_192_f8(args: AttentionArgs);
    /// A warp per item: 16 query rows, D = 256.
    fn attention_split_256_f8(args: AttentionArgs);
    /// A block per item: 64 query rows, D = 256.
    fn attention_block_256_f8(args: AttentionArgs);
}

/// The split and block kernels for a head size that [`super::Geometry::new`] knows.
pub(super) fn launchers(head_dim: usize) -> [Launcher; 2] {
    match head_dim {
        16 => [attention_split_16_f8, attention_block_16_f8],
        32 => [attention_split_32_f8, attention_block_32_f8],
        64 => [attention_split_64_f8, attention_block_64_f8],
        80 => [attention_split_80_f8, attention_block_80_f8],
        96 => [attention_split_96_f8, attention_block_96_f8],
        128 => [attention_split_128_f8, attention_block_128_f8],
        192 => [attention_split_192_f8, attention_block_192_f8],
        _ => [attention_split_256_f8, attention_block_256_f8],
    }
}
