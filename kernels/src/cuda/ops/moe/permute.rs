//! `moe_permute.cu`.

use super::MoeShape;
use crate::{
    KernelError,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        ops::linear::LinearKernel,
        table::kernels,
        words::DeviceWords,
    },
};

kernels! {
    file "moe_permute";
    /// One block per expert.
    fn moe_permute_u32(
        sorted_pairs: DevPtr, offsets: DevPtr, tiles: DevPtr, ids: DevPtr,
        pairs: u32, experts: u32, tile_tokens: u32, max_tiles: u32,
    );
}

const OP: &str = "moe_permute";
const THREADS: u32 = 512;

/// The pairs of a step in the order of their experts: where [`moe_permute`] writes it and [`super::moe_linear`] reads it.
#[derive(Clone, Copy)]
pub struct MoeOrder<'a> {
    /// `[T * k]` pairs by expert, then by number; pair p is the p % k-th expert of token p / k.
    pub sorted_pairs: DeviceWords<'a>,
    /// `[E + 1]` where each expert's pairs begin in it.
    pub offsets: DeviceWords<'a>,
    /// `[max_tiles, 2]` (expert, first position) of each token tile; see [`MoeShape::max_tiles`].
    pub tiles: DeviceWords<'a>,
    /// E and k.
    pub shape: MoeShape,
    /// T.
    pub tokens: usize,
    /// The kernel whose tiles these are; [`MoeShape::kernel`] suggests one.
    pub kernel: LinearKernel,
}

/// Addresses of an order whose extents were checked.
pub(super) struct OrderPtrs {
    pub sorted_pairs: DevPtr,
    pub offsets: DevPtr,
    pub tiles: DevPtr,
}

impl MoeOrder<'_> {
    /// T * k.
    pub fn pairs(&self) -> usize {
        self.tokens * self.shape.top_k
    }

    /// Entries of `tiles`.
    pub fn max_tiles(&self) -> usize {
        self.shape.max_tiles(self.tokens, self.kernel)
    }

    pub(super) fn check(&self, op: &'static str) -> Result<OrderPtrs> {
        self.shape.check(op)?;
        let tiles = self.tiles.at_least(op, "tiles", 2 * self.max_tiles())?;
        if !tiles.0.is_multiple_of(8) {
            let detail = "tiles begin off a multiple of 8 bytes".into();
            return Err(KernelError::Unsupported { op, detail });
        }
        Ok(OrderPtrs {
            sorted_pairs: self.sorted_pairs.at_least(op, "sorted_pairs", self.pairs())?,
            offsets: self.offsets.at_least(op, "offsets", self.shape.experts + 1)?,
            tiles,
        })
    }
}

/// Arguments of [`moe_permute`].
pub struct MoePermute<'a> {
    /// Written.
    pub order: MoeOrder<'a>,
    /// `[T, k]` expert of each pair, below E.
    pub ids: DeviceWords<'a>,
}

/// Queues the sort of a step's pairs. No tokens: does nothing.
///
/// # Errors
/// More experts than the kernel takes; index tensors that are too small; what the driver reports.
pub fn moe_permute(device: &Device, call: MoePermute<'_>) -> Result<()> {
    let MoePermute { order, ids } = call;
    let OrderPtrs { sorted_pairs, offsets, tiles } = order.check(OP)?;
    let ids = ids.at_least(OP, "ids", order.pairs())?;
    if order.tokens == 0 {
        return Ok(());
    }
    let config = LaunchConfig::linear(order.shape.experts, THREADS);
    // SAFETY: the extents of all index tensors were checked above; ids below E are the caller's promise, which `moe_route` keeps.
    unsafe {
        moe_permute_u32(
            device.driver(),
            config,
            sorted_pairs,
            offsets,
            tiles,
            ids,
            order.pairs() as u32,
            order.shape.experts as u32,
            order.kernel.tokens() as u32,
            order.max_tiles() as u32,
        )
    }
}
