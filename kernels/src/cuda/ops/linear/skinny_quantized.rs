//! `linear_skinny_quantized.cu`.

use super::{Grouping, LinearArgs, LinearKernel};
use crate::cuda::{
    driver::{Driver, LaunchConfig, Result},
    table::kernels,
};

kernels! {
    file "linear_skinny_quantized";
    /// 16 weight rows of 8 bits by 8 tokens.
    fn linear_skinny_16x8_w8(args: LinearArgs);
    /// 16 weight rows of 8 bits by 16 tokens.
    fn linear_skinny_16x16_w8(args: LinearArgs);
    /// 32 weight rows of 8 bits by 32 tokens.
    fn linear_skinny_32x32_w8(args: LinearArgs);
    /// 32 weight rows of 8 bits by 64 tokens.
    fn linear_skinny_32x64_w8(args: LinearArgs);
    /// 16 weight rows of 4 bits by 8 tokens.
    fn linear_skinny_16x8_w4(args: LinearArgs);
    /// 16 weight rows of 4 bits by 16 tokens.
    fn linear_skinny_16x16_w4(args: LinearArgs);
    /// 32 weight rows of 4 bits by 32 tokens.
    fn linear_skinny_32x32_w4(args: LinearArgs);
    /// 32 weight rows of 4 bits by 64 tokens.
    fn linear_skinny_32x64_w4(args: LinearArgs);
    /// 16 weight rows of 8 bits by 8 tokens. Rows of experts.
    fn grouped_skinny_16x8_w8(args: LinearArgs);
    /// 16 weight rows of 8 bits by 16 tokens. Rows of experts.
    fn grouped_skinny_16x16_w8(args: LinearArgs);
    /// 32 weight rows of 8 bits by 32 tokens. Rows of experts.
    fn grouped_skinny_32x32_w8(args: LinearArgs);
    /// 32 weight rows of 8 bits by 64 tokens. Rows of experts.
    fn grouped_skinny_32x64_w8(args: LinearArgs);
    /// 16 weight rows of 4 bits by 8 tokens. Rows of experts.
    fn grouped_skinny_16x8_w4(args: LinearArgs);
    /// 16 weight rows of 4 bits by 16 tokens. Rows of experts.
    fn grouped_skinny_16x16_w4(args: LinearArgs);
    /// 32 weight rows of 4 bits by 32 tokens. Rows of experts.
    fn grouped_skinny_32x32_w4(args: LinearArgs);
    /// 32 weight rows of 4 bits by 64 tokens. Rows of experts.
    fn grouped_skinny_32x64_w4(args: LinearArgs);
}

const THREADS: u32 = 256;

type Launch = unsafe fn(&dyn Driver, LaunchConfig, LinearArgs) -> Result<()>;

/// Queues `kernel` on a grid of token tiles by blocks of weight rows.
pub(super) fn launch(
    driver: &dyn Driver,
    kernel: LinearKernel,
    grouping: Grouping,
    grid: [usize; 2],
    args: LinearArgs,
) -> Result<()> {
    use Grouping::{Dense, Experts};
    use LinearKernel::{Skinny16x8, Skinny16x16, Skinny32x32};
    // What a block keeps in flight of its tokens: so many blocks of 32 of K in each of 8 warps.
    let in_flight = match kernel.tokens() {
        64 => 3,
        32 => 2,
        _ => 4,
    };
    let shared_bytes = (512 * kernel.tokens() * in_flight) as u32;
    let config =
        LaunchConfig { grid: [grid[0] as u32, grid[1] as u32, 1], block: [THREADS, 1, 1], shared_bytes };
    let launch: Launch = match (kernel, grouping, args.bits()) {
        (Skinny16x8, Dense, 8) => linear_skinny_16x8_w8,
        (Skinny16x8, Dense, _) => linear_skinny_16x8_w4,
        (Skinny16x8, Experts, 8) => grouped_skinny_16x8_w8,
        (Skinny16x8, Experts, _) => grouped_skinny_16x8_w4,
        (Skinny16x16, Dense, 8) => linear_skinny_16x16_w8,
        (Skinny16x16, Dense, _) => linear_skinny_16x16_w4,
        (Skinny16x16, Experts, 8) => grouped_skinny_16x16_w8,
        (Skinny16x16, Experts, _) => grouped_skinny_16x16_w4,
        (Skinny32x32, Dense, 8) => linear_skinny_32x32_w8,
        (Skinny32x32, Dense, _) => linear_skinny_32x32_w4,
        (Skinny32x32, Experts, 8) => grouped_skinny_32x32_w8,
        (Skinny32x32, Experts, _) => grouped_skinny_32x32_w4,
        (_, Dense, 8) => linear_skinny_32x64_w8,
        (_, Dense, _) => linear_skinny_32x64_w4,
        (_, Experts, 8) => grouped_skinny_32x64_w8,
        (_, Experts, _) => grouped_skinny_32x64_w4,
    };
    // SAFETY: `args` comes from `Operands::check`, which looked at every extent, and the caller added checked rows.
    unsafe { launch(driver, config, args) }
}
