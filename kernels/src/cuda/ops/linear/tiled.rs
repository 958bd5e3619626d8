//! `linear_tiled.cu`.

use super::{Grouping, LinearArgs, LinearKernel};
use crate::cuda::{
    driver::{Driver, LaunchConfig, Result},
    table::kernels,
};

kernels! {
    file "linear_tiled";
    /// A block computes 128 weight rows by 64 tokens.
    fn linear_tiled_128x64(args: LinearArgs, token_tiles: u32);
    /// A block computes 128 weight rows by 128 tokens.
    fn linear_tiled_128x128(args: LinearArgs, token_tiles: u32);
    /// A block computes 128 weight rows by 64 tokens. Rows of experts.
    fn grouped_tiled_128x64(args: LinearArgs, token_tiles: u32);
    /// A block computes 128 weight rows by 128 tokens. Rows of experts.
    fn grouped_tiled_128x128(args: LinearArgs, token_tiles: u32);
}

const THREADS: u32 = 256;
/// Blocks of 32 of K that are in shared memory.
const STAGES: usize = 4;
/// Bytes of a token in the staged output.
const STAGED_BYTES: usize = 528;

/// The launch of a kernel for weights of `bits` bits.
pub(super) fn config(kernel: LinearKernel, [token_tiles, row_blocks]: [usize; 2], bits: u32) -> LaunchConfig {
    let tokens = kernel.tokens();
    let scales = if bits < 16 { 2 * 8 * kernel.weight_rows() } else { 0 };
    let stage = 4 * bits as usize * kernel.weight_rows() + 64 * tokens + scales;
    LaunchConfig {
        grid: [(token_tiles * row_blocks) as u32, 1, 1],
        block: [THREADS, 1, 1],
        shared_bytes: (stage * STAGES).max(STAGED_BYTES * tokens) as u32,
    }
}

/// Queues `kernel` on a grid of token tiles by blocks of weight rows.
pub(super) fn launch(
    driver: &dyn Driver,
    kernel: LinearKernel,
    grouping: Grouping,
    grid: [usize; 2],
    args: LinearArgs,
) -> Result<()> {
    let (config, tiles) = (config(kernel, grid, 16), grid[0] as u32);
    // SAFETY: `args` comes from `Operands::check`, which looked at every extent, and the caller added checked rows.
    unsafe {
        match (kernel, grouping) {
            (LinearKernel::Tiled128x64, Grouping::Dense) => linear_tiled_128x64(driver, config, args, tiles),
            (LinearKernel::Tiled128x64, Grouping::Experts) => {
                grouped_tiled_128x64(driver, config, args, tiles)
            }
            (_, Grouping::Dense) => linear_tiled_128x128(driver, config, args, tiles),
            (_, Grouping::Experts) => grouped_tiled_128x128(driver, config, args, tiles),
        }
    }
}
