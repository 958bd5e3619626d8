//! `rmsnorm.cu`.

use super::{Checked, THREADS};
use crate::cuda::{
    Device,
    driver::{DevPtr, LaunchConfig, Result},
    table::kernels,
};

kernels! {
    file "rmsnorm";
    /// One block per slice.
    fn rmsnorm_bf16(
        out: DevPtr, x: DevPtr, weight: DevPtr, groups: i32, width: i32, stride: i32, offset: i32, add: i32, eps: f32,
    );
}

/// Queues it for so many slices.
pub(super) fn launch(device: &Device, slices: usize, args: Checked) -> Result<()> {
    let Checked { out, x, weight, groups, width, stride, offset, add, eps } = args;
    let config = LaunchConfig::linear(slices, THREADS);
    // SAFETY: the extents of all buffers were checked.
    unsafe { rmsnorm_bf16(device.driver(), config, out, x, weight, groups, width, stride, offset, add, eps) }
}
