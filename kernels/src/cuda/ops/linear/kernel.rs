//! Which kernel computes a product.

/// A kernel by the weight rows and tokens of one block.
///
/// The skinny ones stream the weights from memory into registers, the 8 warps of a block sharing K among them; the tiled ones
/// reuse both operands in shared memory. They all add up in the same order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearKernel {
    /// 16 weight rows by 8 tokens, skinny.
    Skinny16x8,
    /// 16 by 16, skinny.
    Skinny16x16,
    /// 32 by 16, skinny.
    Skinny32x16,
    /// 32 by 32, skinny.
    Skinny32x32,
    /// 32 by 64, skinny.
    Skinny32x64,
    /// 64 by 64, skinny.
    Skinny64x64,
    /// 128 by 64, tiled.
    Tiled128x64,
    /// 128 by 128, tiled.
    Tiled128x128,
}

use LinearKernel::{
    Skinny16x8, Skinny16x16, Skinny32x16, Skinny32x32, Skinny32x64, Skinny64x64, Tiled128x64, Tiled128x128,
};

impl LinearKernel {
    /// All of them.
    pub const ALL: [LinearKernel; 8] = [
        Skinny16x8,
        Skinny16x16,
        Skinny32x16,
        Skinny32x32,
        Skinny32x64,
        Skinny64x64,
        Tiled128x64,
        Tiled128x128,
    ];

    /// Weight rows of a block.
    pub fn weight_rows(self) -> usize {
        match self {
            Skinny16x8 | Skinny16x16 => 16,
            Skinny32x16 | Skinny32x32 | Skinny32x64 => 32,
            Skinny64x64 => 64,
            Tiled128x64 | Tiled128x128 => 128,
        }
    }

    /// Tokens of a block.
    pub fn tokens(self) -> usize {
        match self {
            Skinny16x8 => 8,
            Skinny16x16 | Skinny32x16 => 16,
            Skinny32x32 => 32,
            Skinny32x64 | Skinny64x64 | Tiled128x64 => 64,
            Tiled128x128 => 128,
        }
    }

    /// The kernel with as many tokens that there is for quantised weights.
    pub fn quantized(self) -> Self {
        match self {
            Skinny32x16 => Skinny16x16,
            Skinny64x64 => Skinny32x64,
            other => other,
        }
    }

    /// Whether it is one of `linear_tiled.cuh`.
    pub fn is_tiled(self) -> bool {
        matches!(self, Tiled128x64 | Tiled128x128)
    }

    /// The kernel for `rows` tokens and a weight of `tile_rows` rows on a device of `num_sms`.
    ///
    /// Few rows: the narrowest token tile that holds them all, so that weights are read once; more weight rows per block where
    /// enough blocks remain, since each block reads the tokens anew. Many rows: the largest tile that gives two thirds of the
    /// multiprocessors a block; where none does, the skinny ones, which share K among warps.
    pub fn choose(rows: usize, tile_rows: usize, num_sms: u32) -> LinearKernel {
        let fills = |kernel: Self| {
            let blocks = tile_rows.div_ceil(kernel.weight_rows()) * rows.div_ceil(kernel.tokens());
            3 * blocks >= 2 * num_sms as usize
        };
        let wide_or = |wide: Self, narrow: Self| if fills(wide) { wide } else { narrow };
        match rows {
            0..=8 => Skinny16x8,
            9..=16 => wide_or(Skinny32x16, Skinny16x16),
            17..=32 => Skinny32x32,
            33..=64 => wide_or(Skinny64x64, Skinny32x64),
            _ if fills(Tiled128x128) => Tiled128x128,
            _ if fills(Tiled128x64) || rows > 256 => Tiled128x64,
            _ => wide_or(Skinny64x64, Skinny32x64),
        }
    }
}
