//! Tensors as they are stored, before anything is made of them.

use std::path::Path;

use bytes::Bytes;
use rayon::prelude::*;
use safetensors::Dtype;
use tidemill_kernels::{
    cpu::resident_with,
    tensor::{DType, HostTensor},
};

use crate::error::LoadError;

/// A stored tensor, whose bytes are as many as type and shape say.
pub(in super::super) struct Raw<'a> {
    pub path: &'a Path,
    pub name: String,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub data: Bytes,
}

impl Raw<'_> {
    /// Checks the shape.
    pub fn shaped(self, expected: &[usize]) -> Result<Self, LoadError> {
        if self.shape == expected {
            return Ok(self);
        }
        Err(LoadError::TensorShape {
            path: self.path.to_path_buf(),
            tensor: self.name,
            got: self.shape.to_vec(),
            expected: expected.to_vec(),
        })
    }

    /// Checks the type.
    pub fn typed(self, wanted: Dtype) -> Result<Self, LoadError> {
        if self.dtype == wanted {
            return Ok(self);
        }
        Err(self.unsupported(&format!("has type {:?} where {wanted:?} is expected", self.dtype)))
    }

    /// The error for a tensor that asks for what we do not implement.
    pub fn unsupported(&self, detail: &str) -> LoadError {
        super::unsupported(self.path, format!("tensor {:?} [{:?}] {detail}", self.name, self.dtype))
    }

    /// The elements as f32.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] for a type that is no scale's.
    pub fn floats(&self) -> Result<Vec<f32>, LoadError> {
        let plain = |dtype| {
            let (name, shape, data) = (self.name.clone(), self.shape.to_vec(), self.data.clone());
            HostTensor { name, dtype, shape, data }.to_f32()
        };
        Ok(match self.dtype {
            Dtype::F32 => plain(DType::F32),
            Dtype::F16 => plain(DType::F16),
            Dtype::BF16 => plain(DType::Bf16),
            // OCP MX: a power of two, 255 is no number.
            Dtype::F8_E8M0 => self
                .data
                .iter()
                .map(|&b| if b == 255 { f32::NAN } else { (f32::from(b) - 127.0).exp2() })
                .collect(),
            _ => return Err(self.unsupported("is no type of scales; supported: F32, F16, BF16, F8_E8M0")),
        })
    }

    /// Word `i` of 32-bit integers.
    pub fn word(&self, i: usize) -> u32 {
        let at = &self.data[4 * i..4 * i + 4];
        u32::from_le_bytes([at[0], at[1], at[2], at[3]])
    }
}

/// Memory for repacked weights, which `fill` gets in pieces of `piece` bytes and their numbers, in parallel.
pub(super) fn repacked(
    bytes: usize,
    piece: usize,
    fill: impl Fn(usize, &mut [u8]) + Sync,
) -> Result<Bytes, LoadError> {
    let all = resident_with(bytes, |all| {
        all.par_chunks_mut(piece.max(1)).enumerate().for_each(|(i, piece)| fill(i, piece));
    })?;
    Ok(all)
}

/// Words `[rows, columns]` become `[columns, rows]`; every byte is changed by `xor`.
pub(super) fn transposed_words(raw: &Raw, rows: usize, columns: usize, xor: u8) -> Result<Bytes, LoadError> {
    // As many columns as a line of the cache holds are taken together.
    const TOGETHER: usize = 16;
    repacked(4 * rows * columns, 4 * rows * TOGETHER, |i, out| {
        let first = i * TOGETHER;
        for r in 0..rows {
            for c in 0..out.len() / (4 * rows) {
                let word = &raw.data[4 * (r * columns + first + c)..][..4];
                for (o, w) in out[4 * (c * rows + r)..][..4].iter_mut().zip(word) {
                    *o = w ^ xor;
                }
            }
        }
    })
}

/// f32 as bytes.
pub(super) fn float_bytes(values: impl IntoIterator<Item = f32>) -> Bytes {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}
