//! `linear_skinny.cu`.

use super::{Grouping, LinearArgs, LinearKernel};
use crate::cuda::{
    driver::{Driver, LaunchConfig, Result},
    table::kernels,
};

kernels! {
    file "linear_skinny";
    /// A block computes 16 weight rows by 8 tokens.
    fn linear_skinny_16x8(args: LinearArgs);
    /// A block computes 16 weight rows by 16 tokens.
    fn linear_skinny_16x16(args: LinearArgs);
    /// A block computes 32 weight rows by 16 tokens.
    fn linear_skinny_32x16(args: LinearArgs);
    /// A block computes 32 weight rows by 32 tokens.
    fn linear_skinny_32x32(args: LinearArgs);
    /// A block computes 32 weight rows by 64 tokens.
    fn linear_skinny_32x64(args: LinearArgs);
    /// A block computes 64 weight rows by 64 tokens.
    fn linear_skinny_64x64(args: LinearArgs);
    /// A block computes 16 weight rows by 8 tokens. Rows of experts.
    fn grouped_skinny_16x8(args: LinearArgs);
    /// A block computes 16 weight rows by 16 tokens. Rows of experts.
    fn grouped_skinny_16x16(args: LinearArgs);
    /// A block computes 32 weight rows by 16 tokens. Rows of experts.
    fn grouped_skinny_32x16(args: LinearArgs);
    /// A block computes 32 weight rows by 32 tokens. Rows of experts.
    fn grouped_skinny_32x32(args: LinearArgs);
    /// A block computes 32 weight rows by 64 tokens. Rows of experts.
    fn grouped_skinny_32x64(args: LinearArgs);
    /// A block computes 64 weight rows by 64 tokens. Rows of experts.
    fn grouped_skinny_64x64(args: LinearArgs);
}

const THREADS: u32 = 256;

/// Queues `kernel` on a grid of token tiles by blocks of weight rows.
pub(super) fn launch(
    driver: &dyn Driver,
    kernel: LinearKernel,
    grouping: Grouping,
    grid: [usize; 2],
    args: LinearArgs,
) -> Result<()> {
    use Grouping::{Dense, Experts};
    use LinearKernel::{Skinny16x8, Skinny16x16, Skinny32x16, Skinny32x32, Skinny32x64};
    // What a block keeps in flight of its tokens: so many blocks of 32 of K in each of 8 warps.
    let in_flight = match kernel.tokens() {
        64 => 2,
        32 => 3,
        _ => 4,
    };
    let shared_bytes = (512 * kernel.tokens() * in_flight) as u32;
    let config =
        LaunchConfig { grid: [grid[0] as u32, grid[1] as u32, 1], block: [THREADS, 1, 1], shared_bytes };
    // SAFETY: `args` comes from `Operands::check`, which looked at every extent, and the caller added checked rows.
    unsafe {
        match (kernel, grouping) {
            (Skinny16x8, Dense) => linear_skinny_16x8(driver, config, args),
            (Skinny16x8, Experts) => grouped_skinny_16x8(driver, config, args),
            (Skinny16x16, Dense) => linear_skinny_16x16(driver, config, args),
            (Skinny16x16, Experts) => grouped_skinny_16x16(driver, config, args),
            (Skinny32x16, Dense) => linear_skinny_32x16(driver, config, args),
            (Skinny32x16, Experts) => grouped_skinny_32x16(driver, config, args),
            (Skinny32x32, Dense) => linear_skinny_32x32(driver, config, args),
            (Skinny32x32, Experts) => grouped_skinny_32x32(driver, config, args),
            (Skinny32x64, Dense) => linear_skinny_32x64(driver, config, args),
            (Skinny32x64, Experts) => grouped_skinny_32x64(driver, config, args),
            (_, Dense) => linear_skinny_64x64(driver, config, args),
            (_, Experts) => grouped_skinny_64x64(driver, config, args),
        }
    }
}
