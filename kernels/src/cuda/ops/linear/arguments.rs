//! The door of a matrix product.

use crate::{
    DType, KernelError,
    cuda::{
        driver::{DevPtr, Result},
        matrix::ProductWeight,
        memory::{DeviceBuffer, require_multiple},
    },
    ops::Activation as ActivationKind,
};

/// What a matrix product does with `v = x · weightᵀ + bias`, in f32, before it is rounded to `out`'s type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LinearEpilogue {
    /// `out = v`.
    Store,
    /// `out += v`: the residual connection. `out` is bf16.
    Add,
    /// `out = f(v)`. Not [`ActivationKind::SwigluOai`], which takes two values.
    Activate(ActivationKind),
    /// `out[r, i] = f(v[r, i]) * v[r, N + i]`: the gated feed-forward block (Shazeer 2020). The weight holds 2 N rows.
    Gated(ActivationKind),
    /// `out = cap * tanh(v / cap)`: bounded logits (Gemma Team 2024, section 2). The cap is positive.
    SoftCap(f32),
}

impl LinearEpilogue {
    /// Rows of the weight per column of the output.
    fn weight_rows(self) -> usize {
        if matches!(self, Self::Gated(_)) { 2 } else { 1 }
    }

    /// Rows of the weight for N outputs, up to whole mma tiles of 16: a gated one holds 8 gates and their 8 ups.
    pub(super) fn tile_rows(self, n: usize) -> usize {
        (self.weight_rows() * n).next_multiple_of(16)
    }
}

/// Whether the rows of a product share one weight or belong to experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cuda::ops) enum Grouping {
    Dense,
    Experts,
}

// Values and bits of linear.cuh.
const GATED: u32 = 1;
const RESIDUAL: u32 = 2;
const OUT_F32: u32 = 4;
const BIAS_BF16: u32 = 8;
const OFFSETS: u32 = 16;
const FLOAT_CODES: u32 = 32;
// Beyond those: which kernels a weight takes.
const BITS_8: u32 = 64;
const BITS_4: u32 = 128;
const IDENTITY: u32 = 0;
const SOFT_CAP: u32 = 4;

/// `LinearArgs` of linear.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda::ops) struct LinearArgs {
    pub out: DevPtr,
    pub x: DevPtr,
    pub weight: DevPtr,
    pub bias: DevPtr,
    pub scales: DevPtr,
    pub tiles: DevPtr,
    pub offsets: DevPtr,
    pub pairs: DevPtr,
    pub rows: u32,
    pub width: u32,
    pub depth: u32,
    pub activation: u32,
    pub flags: u32,
    pub divisor: u32,
    pub cap: f32,
    pub scale_stride: u32,
    pub scale_shift: u32,
    pub alpha: f32,
}

impl LinearArgs {
    /// Bits of a weight: 16, 8 or 4.
    pub fn bits(&self) -> u32 {
        match self.flags & (BITS_8 | BITS_4) {
            BITS_8 => 8,
            BITS_4 => 4,
            _ => 16,
        }
    }

    /// Rows of the weight, up to whole mma tiles.
    pub fn tile_rows(&self) -> usize {
        let rows = if self.flags & GATED != 0 { 2 * self.width } else { self.width };
        (rows as usize).next_multiple_of(16)
    }
}

/// The tensors of a product, before they are checked.
pub(in crate::cuda::ops) struct Operands<'a> {
    pub op: &'static str,
    pub out: &'a mut DeviceBuffer,
    pub out_rows: usize,
    pub x: &'a DeviceBuffer,
    pub x_rows: usize,
    pub weight: &'a dyn ProductWeight,
    pub bias: Option<&'a DeviceBuffer>,
    pub experts: usize,
    pub n: usize,
    pub k: usize,
    pub epilogue: LinearEpilogue,
}

impl Operands<'_> {
    /// The kernels' argument, without what the caller knows of rows and experts.
    pub fn check(&self) -> Result<LinearArgs> {
        let Self { op, n, k, epilogue, .. } = *self;
        require_multiple(op, "K", k, 8)?;
        require_multiple(op, "N", n, 1)?;
        let weight_rows = epilogue.weight_rows() * n;
        self.require_index_range(weight_rows)?;
        let (activation, [cap, alpha]) = activation_of(epilogue);
        if let LinearEpilogue::SoftCap(cap) = epilogue
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(self.unsupported(format!("a soft cap of {cap}; it must be positive")));
        }
        if let LinearEpilogue::Activate(kind @ ActivationKind::SwigluOai { .. }) = epilogue {
            return Err(self.unsupported(format!("{kind:?} takes a gate")));
        }
        let mut flags = if epilogue.weight_rows() == 2 { GATED } else { 0 };
        flags |= if epilogue == LinearEpilogue::Add { RESIDUAL } else { 0 };
        let out_dtype = self.out.dtype();
        flags |= match out_dtype {
            DType::Bf16 => 0,
            DType::F32 if epilogue != LinearEpilogue::Add => OUT_F32,
            _ => return Err(self.unsupported(format!("{epilogue:?} into {out_dtype:?}"))),
        };
        let bias = match self.bias {
            None => DevPtr::NULL,
            Some(bias) => {
                flags |= if bias.dtype() == DType::Bf16 { BIAS_BF16 } else { 0 };
                let dtype = if bias.dtype() == DType::Bf16 { DType::Bf16 } else { DType::F32 };
                bias.at_least(op, "bias", dtype, self.experts * weight_rows)?
            }
        };
        let weight = self.weight.place(op, self.experts * weight_rows, k)?;
        flags |= if weight.offsets { OFFSETS } else { 0 };
        flags |= if weight.float_codes { FLOAT_CODES } else { 0 };
        flags |= match weight.bits {
            8 => BITS_8,
            4 => BITS_4,
            _ => 0,
        };
        Ok(LinearArgs {
            out: self.out.at_least(op, "out", out_dtype, self.out_rows * n)?,
            x: self.x.at_least(op, "x", DType::Bf16, self.x_rows * k)?,
            weight: weight.data,
            bias,
            scales: weight.scales,
            tiles: DevPtr::NULL,
            offsets: DevPtr::NULL,
            pairs: DevPtr::NULL,
            rows: 0,
            width: n as u32,
            depth: k as u32,
            activation,
            flags,
            divisor: 1,
            cap,
            scale_stride: weight.scale_stride,
            scale_shift: weight.scale_shift,
            alpha,
        })
    }

    /// The kernels count 16-byte chunks of an operand, and blocks of 16 weight rows, in 32 and 16 bits.
    fn require_index_range(&self, weight_rows: usize) -> Result<()> {
        let chunks = self.k / 8;
        let most = weight_rows.max(self.x_rows).max(self.out_rows);
        if most.saturating_mul(chunks) > u32::MAX as usize || weight_rows.div_ceil(16) > u16::MAX as usize {
            let detail =
                format!("{weight_rows} weight rows and {} rows of {} are too many", self.x_rows, self.k);
            return Err(self.unsupported(detail));
        }
        Ok(())
    }

    fn unsupported(&self, detail: String) -> KernelError {
        KernelError::Unsupported { op: self.op, detail }
    }
}

/// `LinearArgs::activation`, and `LinearArgs::cap` and `LinearArgs::alpha`.
fn activation_of(epilogue: LinearEpilogue) -> (u32, [f32; 2]) {
    match epilogue {
        LinearEpilogue::Store | LinearEpilogue::Add => (IDENTITY, [0.0; 2]),
        LinearEpilogue::SoftCap(cap) => (SOFT_CAP, [cap, 0.0]),
        LinearEpilogue::Activate(kind) | LinearEpilogue::Gated(kind) => match kind {
            ActivationKind::Silu => (1, [0.0; 2]),
            ActivationKind::Gelu => (2, [0.0; 2]),
            ActivationKind::GeluTanh => (3, [0.0; 2]),
            ActivationKind::Relu => (5, [0.0; 2]),
            ActivationKind::SwigluOai { alpha, limit } => (6, [limit, alpha]),
        },
    }
}
