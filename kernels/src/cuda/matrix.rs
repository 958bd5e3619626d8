//! Matrices in device memory, as products read them: in bf16, or as codes with scales (`quantized.cuh`).

use std::sync::Arc;

use super::{
    driver::{DevPtr, Driver, Result},
    memory::{DeviceBuffer, DeviceMemory, require_multiple},
};
use crate::{error::KernelError, tensor::DType};

/// What a product multiplies with.
pub trait ProductWeight {
    /// Where it is, if it has at least `rows` rows of `k` columns.
    ///
    /// # Errors
    /// [`KernelError::Shape`], [`KernelError::Unsupported`].
    fn place(&self, op: &'static str, rows: usize, k: usize) -> Result<WeightPlace>;
}

/// A matrix as the kernels find it.
#[derive(Debug, Clone, Copy)]
pub struct WeightPlace {
    pub(super) data: DevPtr,
    /// Null for bf16, as are the fields below for those that have no use for them.
    pub(super) scales: DevPtr,
    /// 4-byte words from one row's scales to the next.
    pub(super) scale_stride: u32,
    /// log2 of the columns that share a scale.
    pub(super) scale_shift: u32,
    /// Bits of a weight: 16, 8 or 4.
    pub(super) bits: u32,
    pub(super) float_codes: bool,
    pub(super) offsets: bool,
}

impl ProductWeight for DeviceBuffer {
    fn place(&self, op: &'static str, rows: usize, k: usize) -> Result<WeightPlace> {
        let data = self.at_least(op, "weight", DType::Bf16, rows * k)?;
        let (scales, offsets, float_codes) = (DevPtr::NULL, false, false);
        Ok(WeightPlace { data, scales, scale_stride: 0, scale_shift: 0, bits: 16, float_codes, offsets })
    }
}

/// What the weights of a matrix are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// 0 to 15, two to a byte; without offsets -8 to 7, with 8 added.
    Int4,
    /// -128 to 127.
    Int8,
    /// F8E4M3.
    Fp8,
    /// E2M1, two to a byte, with scales of 8 bits: OCP MX.
    Mxfp4,
}

impl Code {
    fn bits(self) -> usize {
        match self {
            Code::Int4 | Code::Mxfp4 => 4,
            Code::Int8 | Code::Fp8 => 8,
        }
    }
}

/// How a matrix is coded: `w = code * scale + offset`.
///
/// Beside 4 or 8 bits a weight it takes 4 bytes per group, and as many again for offsets; MX, 1 byte per 32 weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coding {
    /// The codes.
    pub code: Code,
    /// Columns that share a scale, and an offset: a power of two from 16 on; more than K: one for the row. 32 for MX.
    pub group: usize,
    /// Whether there are offsets.
    pub offsets: bool,
}

impl Coding {
    /// Bytes of a row's codes.
    pub(super) fn code_bytes(self, k: usize) -> usize {
        k * self.code.bits() / 8
    }

    /// Bytes of a row's scales and offsets.
    pub(super) fn scale_bytes(self, k: usize) -> usize {
        match self.code {
            Code::Mxfp4 => (k / 32).next_multiple_of(4),
            _ => k.div_ceil(self.group) * if self.offsets { 8 } else { 4 },
        }
    }
}

/// A quantised matrix `[rows, K]`.
pub struct CodedMatrix {
    pub(super) codes: DeviceMemory,
    pub(super) scales: DeviceMemory,
    coding: Coding,
    rows: usize,
    k: usize,
}

impl CodedMatrix {
    /// Allocates, contents unspecified.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Unsupported`] for a K that is no multiple of 32, or groups that are not as [`Coding`] says.
    pub(super) fn new(driver: &Arc<dyn Driver>, coding: Coding, [rows, k]: [usize; 2]) -> Result<Self> {
        require_multiple("weight", "K of a quantised matrix", k, 32)?;
        if !coding.group.is_power_of_two() || coding.group < 16 {
            let detail = format!("groups of {} columns", coding.group);
            return Err(KernelError::Unsupported { op: "weight", detail });
        }
        let codes = DeviceMemory::new(driver.clone(), rows * coding.code_bytes(k), "weights")?;
        let scales = DeviceMemory::new(driver.clone(), rows * coding.scale_bytes(k), "weights")?;
        Ok(Self { codes, scales, coding, rows, k })
    }

    /// How it is coded.
    pub fn coding(&self) -> Coding {
        self.coding
    }
}

impl ProductWeight for CodedMatrix {
    fn place(&self, op: &'static str, rows: usize, k: usize) -> Result<WeightPlace> {
        if self.rows < rows || self.k != k {
            let (got, expected) = (vec![self.rows, self.k], vec![rows, k]);
            return Err(KernelError::Shape { op, what: "weight".into(), got, expected });
        }
        let Coding { code, group, offsets } = self.coding;
        Ok(WeightPlace {
            data: self.codes.ptr(),
            scales: self.scales.ptr(),
            scale_stride: (self.coding.scale_bytes(k) / 4) as u32,
            scale_shift: group.trailing_zeros(),
            bits: code.bits() as u32,
            float_codes: matches!(code, Code::Fp8 | Code::Mxfp4),
            offsets,
        })
    }
}

/// A resident matrix.
pub enum Matrix {
    /// In bf16.
    Bf16(DeviceBuffer),
    /// Quantised.
    Coded(CodedMatrix),
}

impl Matrix {
    /// The elements, for an op that reads no quantised matrix.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`].
    pub fn bf16(&self, op: &'static str) -> Result<&DeviceBuffer> {
        match self {
            Matrix::Bf16(buffer) => Ok(buffer),
            Matrix::Coded(coded) => {
                let detail = format!("the matrix is {:?}; make it with `Ops::table`", coded.coding);
                Err(KernelError::Unsupported { op, detail })
            }
        }
    }
}

impl ProductWeight for Matrix {
    fn place(&self, op: &'static str, rows: usize, k: usize) -> Result<WeightPlace> {
        match self {
            Matrix::Bf16(buffer) => buffer.place(op, rows, k),
            Matrix::Coded(coded) => coded.place(op, rows, k),
        }
    }
}
