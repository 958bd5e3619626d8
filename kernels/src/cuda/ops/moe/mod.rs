//! A mixture of experts: routing, and products whose rows belong to experts.
//!
//! A step makes an order of the (token, expert) pairs with [`moe_route`] and [`moe_permute`], multiplies with [`moe_linear`] once per
//! matrix, and adds up with [`moe_combine`]. What varies from step to step stays in device memory, and a token's result has
//! the same bits in any batch.

mod combine;
mod permute;
mod product;
mod route;

pub(super) use combine::KERNELS as COMBINE_KERNELS;
pub(super) use permute::KERNELS as PERMUTE_KERNELS;
pub(super) use route::KERNELS as ROUTE_KERNELS;

pub use combine::{MoeCombine, moe_combine};
pub use permute::{MoeOrder, MoePermute, moe_permute};
pub use product::{MoeLinear, MoeRows, moe_linear};
pub use route::{MoeRoute, check_routing, moe_route};

use super::linear::LinearKernel;
use crate::{KernelError, cuda::driver::Result};

/// Most experts.
const MAX_EXPERTS: usize = 512;
/// Most experts per token.
const MAX_TOP_K: usize = 32;

/// Extents of a mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeShape {
    /// E, at most 512.
    pub experts: usize,
    /// k, the experts of a token: at most 32, at most E.
    pub top_k: usize,
}

impl MoeShape {
    fn check(self, op: &'static str) -> Result<()> {
        let Self { experts, top_k } = self;
        if (1..=MAX_EXPERTS).contains(&experts) && (1..=MAX_TOP_K.min(experts)).contains(&top_k) {
            return Ok(());
        }
        let detail = format!(
            "{top_k} of {experts} experts; the CUDA kernels take at most {MAX_TOP_K} of at most {MAX_EXPERTS} (use --device cpu)"
        );
        Err(KernelError::Unsupported { op, detail })
    }

    /// The product kernel for a step of `tokens` tokens: the narrowest token tile that holds an expert's even share.
    pub fn kernel(self, tokens: usize) -> LinearKernel {
        match (tokens * self.top_k).div_ceil(self.experts) {
            0..=8 => LinearKernel::Skinny16x8,
            9..=16 => LinearKernel::Skinny16x16,
            17..=32 => LinearKernel::Skinny32x32,
            33..=64 => LinearKernel::Skinny64x64,
            _ => LinearKernel::Tiled128x128,
        }
    }

    /// Tiles of `kernel.tokens()` rows that the pairs of `tokens` tokens fill at most, however they are spread over the experts.
    pub fn max_tiles(self, tokens: usize, kernel: LinearKernel) -> usize {
        let pairs = tokens * self.top_k;
        pairs.min(pairs / kernel.tokens() + self.experts)
    }

    /// No less than what [`MoeShape::max_tiles`] says for any kernel and up to `tokens` tokens.
    pub fn most_tiles(self, tokens: usize) -> usize {
        self.max_tiles(tokens, LinearKernel::Skinny16x8)
    }
}
