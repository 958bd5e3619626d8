//! `rmsnorm.cu` and `layernorm.cu`.

mod layernorm;
mod rmsnorm;

pub(super) use layernorm::KERNELS as LAYER_KERNELS;
pub(super) use rmsnorm::KERNELS as RMS_KERNELS;

use crate::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{DevPtr, Result},
        memory::{DeviceBuffer, require_multiple},
    },
    ops::{Norm as Form, Slices},
};

const OP: &str = "norm";
const THREADS: u32 = 256;

/// Arguments of [`norm`].
pub struct Norm<'a> {
    /// bf16, written at the slices.
    pub out: &'a mut DeviceBuffer,
    /// bf16, as long; absent: `out` itself.
    pub x: Option<&'a DeviceBuffer>,
    /// Weight and bias hold `groups * width` f32.
    pub form: Form<'a, DeviceBuffer>,
    /// Whole rows, or parts of them; offset, width and stride multiples of 8.
    pub slices: Slices,
    /// Add to what stands in `out`.
    pub add: bool,
}

/// Slices that are whole rows of `width` elements.
pub fn whole_rows(rows: usize, width: usize) -> Slices {
    Slices { rows, stride: width, offset: 0, groups: 1, width }
}

/// What both kernels take, checked.
struct Checked {
    out: DevPtr,
    x: DevPtr,
    weight: DevPtr,
    groups: i32,
    width: i32,
    stride: i32,
    offset: i32,
    add: i32,
    eps: f32,
}

/// Queues the norm of each slice; see [`crate::Ops::norm`], [`crate::Ops::norm_add`] and [`crate::Ops::norm_slices`].
///
/// # Errors
/// Slices that the vector loads cannot take; a buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn norm(device: &Device, call: Norm<'_>) -> Result<()> {
    let Norm { out, x, form, slices, add } = call;
    let Slices { rows, stride, offset, groups, width } = slices;
    require_multiple(OP, "the width", width, 8)?;
    require_multiple(OP, "the stride", stride, 8)?;
    if groups == 0 || !offset.is_multiple_of(8) || offset + groups * width > stride {
        let detail = format!("{groups} parts of {width} from element {offset} on of rows of {stride}");
        return Err(KernelError::Unsupported { op: OP, detail });
    }
    if rows == 0 {
        return Ok(());
    }
    let out = out.at_least(OP, "out", DType::Bf16, rows * stride)?;
    let x = x.map_or(Ok(out), |x| x.at_least(OP, "x", DType::Bf16, rows * stride))?;
    let vector = |what, vector: &DeviceBuffer| vector.at_least(OP, what, DType::F32, groups * width);
    let (Form::Rms { weight, eps } | Form::Layer { weight, eps, .. }) = form;
    let checked = Checked {
        out,
        x,
        weight: vector("weight", weight)?,
        groups: groups as i32,
        width: width as i32,
        stride: stride as i32,
        offset: offset as i32,
        add: i32::from(add),
        eps,
    };
    let blocks = rows * groups;
    match form {
        Form::Rms { .. } => rmsnorm::launch(device, blocks, checked),
        Form::Layer { bias, .. } => {
            let bias = bias.map_or(Ok(DevPtr::NULL), |bias| vector("bias", bias))?;
            layernorm::launch(device, blocks, checked, bias)
        }
    }
}
