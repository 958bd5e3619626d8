//! `layernorm.cu`.

use super::{Checked, THREADS};
use crate::cuda::{
    Device,
    driver::{DevPtr, LaunchConfig, Result},
    table::kernels,
};

kernels! {
    file "layernorm";
    /// One block per slice.
    fn layernorm_bf16(
        out: DevPtr, x: DevPtr, weight: DevPtr, bias: DevPtr, groups: i32, width: i32, stride: i32, offset: i32, add: i32, eps: f32,
    );
}

/// Queues it for so many slices.
pub(super) fn launch(device: &Device, slices: usize, args: Checked, bias: DevPtr) -> Result<()> {
    let Checked { out, x, weight, groups, width, stride, offset, add, eps } = args;
    let config = LaunchConfig::linear(slices, THREADS);
    // SAFETY: the extents of all buffers were checked.
    unsafe {
        layernorm_bf16(device.driver(), config, out, x, weight, bias, groups, width, stride, offset, add, eps)
    }
}
