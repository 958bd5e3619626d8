//! `linear_tiled_quantized.cu`.

use super::{Grouping, LinearArgs, LinearKernel, tiled};
use crate::cuda::{
    driver::{Driver, LaunchConfig, Result},
    table::kernels,
};

kernels! {
    file "linear_tiled_quantized";
    /// 128 weight rows of 8 bits by 128 tokens.
    fn linear_tiled_128x128_w8(args: LinearArgs, token_tiles: u32);
    /// 128 weight rows of 8 bits by 64 tokens.
    fn linear_tiled_128x64_w8(args: LinearArgs, token_tiles: u32);
    /// 128 weight rows of 4 bits by 128 tokens.
    fn linear_tiled_128x128_w4(args: LinearArgs, token_tiles: u32);
    /// 128 weight rows of 4 bits by 64 tokens.
    fn linear_tiled_128x64_w4(args: LinearArgs, token_tiles: u32);
    /// 128 weight rows of 8 bits by 128 tokens. Rows of experts.
    fn grouped_tiled_128x128_w8(args: LinearArgs, token_tiles: u32);
    /// 128 weight rows of 8 bits by 64 tokens. Rows of experts.
    fn grouped_tiled_128x64_w8(args: LinearArgs, token_tiles: u32);
    /// 128 weight rows of 4 bits by 128 tokens. Rows of experts.
    fn grouped_tiled_128x128_w4(args: LinearArgs, token_tiles: u32);
    /// 128 weight rows of 4 bits by 64 tokens. Rows of experts.
    fn grouped_tiled_128x64_w4(args: LinearArgs, token_tiles: u32);
}

type Launch = unsafe fn(&dyn Driver, LaunchConfig, LinearArgs, u32) -> Result<()>;

/// Queues `kernel` on a grid of token tiles by blocks of weight rows.
pub(super) fn launch(
    driver: &dyn Driver,
    kernel: LinearKernel,
    grouping: Grouping,
    grid: [usize; 2],
    args: LinearArgs,
) -> Result<()> {
    use Grouping::{Dense, Experts};
    use LinearKernel::Tiled128x64;
    let config = tiled::config(kernel, grid, args.bits());
    let launch: Launch = match (kernel, grouping, args.bits()) {
        (Tiled128x64, Dense, 8) => linear_tiled_128x64_w8,
        (Tiled128x64, Dense, _) => linear_tiled_128x64_w4,
        (Tiled128x64, Experts, 8) => grouped_tiled_128x64_w8,
        (Tiled128x64, Experts, _) => grouped_tiled_128x64_w4,
        (_, Dense, 8) => linear_tiled_128x128_w8,
        (_, Dense, _) => linear_tiled_128x128_w4,
        (_, Experts, 8) => grouped_tiled_128x128_w8,
        (_, Experts, _) => grouped_tiled_128x128_w4,
    };
    // SAFETY: `args` comes from `Operands::check`, which looked at every extent, and the caller added checked rows.
    unsafe { launch(driver, config, args, grid[0] as u32) }
}
