//! Resident matrices: views of checkpoint bytes, stacked along N.

use bytes::Bytes;
use half::{bf16, f16};

use super::{decode::Coded, isa::Host};
use crate::{
    error::KernelError,
    ops::Result,
    tensor::{DType, HostMatrix, HostTensor},
};

/// A matrix `[N, K]` as its parts lie in the checkpoint, each in its own format; nothing is copied but the bias.
pub struct CpuWeight {
    pub(crate) parts: Vec<Part>,
    /// `[N]`, when there is one.
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

/// Rows `first..first + rows` of the matrix.
pub(crate) struct Part {
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) storage: Storage,
}

/// How weights lie in memory.
pub(crate) enum Storage {
    /// Row-major.
    Dense(DType, Bytes),
    /// To be decoded.
    Coded(Coded),
}

/// What the inner loop reads: parts of one form share packed activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The weights as they lie.
    Dense(DType),
    /// What was decoded just before.
    Coded,
}

impl Part {
    pub(crate) fn form(&self) -> Form {
        match &self.storage {
            Storage::Dense(dtype, _) => Form::Dense(*dtype),
            Storage::Coded(_) => Form::Coded,
        }
    }

    /// Bytes of a row as it is stored.
    pub(crate) fn row_bytes(&self, k: usize) -> usize {
        match &self.storage {
            Storage::Dense(dtype, _) => k * dtype.size(),
            Storage::Coded(coded) => coded.row_bytes,
        }
    }
}

impl CpuWeight {
    pub(crate) fn new(parts: &[HostMatrix], bias: &[HostTensor]) -> Result<CpuWeight> {
        let mut views = Vec::with_capacity(parts.len());
        let (mut n, mut width) = (0, None);
        for part in parts {
            let (extents, storage) = match part {
                HostMatrix::Dense(tensor) => {
                    (tensor.shape.clone(), Storage::Dense(tensor.dtype, tensor.data.clone()))
                }
                HostMatrix::Quantized(matrix) => (matrix.shape.into(), Storage::Coded(Coded::new(matrix)?)),
            };
            let &[rows, k] = extents.as_slice() else {
                return Err(shape(part.name(), extents, vec![0, width.unwrap_or(0)]));
            };
            let short =
                matches!(&storage, Storage::Dense(dtype, data) if data.len() != rows * k * dtype.size());
            if width.is_some_and(|width| width != k) || short {
                return Err(shape(part.name(), extents, vec![rows, width.unwrap_or(k)]));
            }
            if let Storage::Dense(DType::F8E4M3, _) = storage {
                let detail = format!("{} is F8E4M3 without scales", part.name());
                return Err(KernelError::Unsupported { op: "weight", detail });
            }
            width = Some(k);
            views.push(Part { first: n, rows, storage });
            n += rows;
        }
        let Some(k) = width else { return Err(shape("parts", vec![], vec![0, 0])) };
        let bias = if bias.is_empty() { None } else { Some(stack_bias(&views, bias)?) };
        Ok(CpuWeight { parts: views, bias, n, k })
    }

    /// Output features, N.
    pub fn rows(&self) -> usize {
        self.n
    }

    /// Input features, K.
    pub fn width(&self) -> usize {
        self.k
    }

    /// Puts every element of row `n` into `out`, as f32.
    pub(crate) fn widen_row(&self, host: Host, n: usize, out: &mut [f32], put: impl Fn(&mut f32, f32)) {
        let part = &self.parts[self.parts.partition_point(|p| p.first + p.rows <= n)];
        let (row, bytes) = (n - part.first, part.row_bytes(self.k));
        match &part.storage {
            Storage::Dense(dtype, data) => widen(out, &data[row * bytes..][..bytes], *dtype, put),
            Storage::Coded(coded) => {
                out.iter_mut().zip(coded.row_to_f32(host, row)).for_each(|(o, x)| put(o, x));
            }
        }
    }
}

fn widen(out: &mut [f32], row: &[u8], dtype: DType, put: impl Fn(&mut f32, f32)) {
    let out = out.iter_mut();
    match dtype {
        DType::Bf16 => {
            out.zip(row.as_chunks().0).for_each(|(o, b)| put(o, bf16::from_le_bytes(*b).to_f32()));
        }
        DType::F16 => out.zip(row.as_chunks().0).for_each(|(o, b)| put(o, f16::from_le_bytes(*b).to_f32())),
        _ => out.zip(row.as_chunks().0).for_each(|(o, b)| put(o, f32::from_le_bytes(*b))),
    }
}

fn stack_bias(parts: &[Part], bias: &[HostTensor]) -> Result<Vec<f32>> {
    if bias.len() != parts.len() {
        return Err(shape("bias", vec![bias.len()], vec![parts.len()]));
    }
    let mut all = Vec::new();
    for (part, bias) in parts.iter().zip(bias) {
        if bias.shape != [part.rows] || bias.data.len() != part.rows * bias.dtype.size() {
            return Err(shape(&bias.name, bias.shape.clone(), vec![part.rows]));
        }
        all.extend(bias.to_f32());
    }
    Ok(all)
}

fn shape(what: &str, got: Vec<usize>, expected: Vec<usize>) -> KernelError {
    KernelError::Shape { op: "weight", what: what.to_owned(), got, expected }
}
