//! Resident matrices: views of checkpoint bytes, stacked along N.

use bytes::Bytes;

use crate::{
    error::KernelError,
    ops::Result,
    tensor::{DType, HostMatrix, HostTensor},
};

/// A matrix `[N, K]` as its parts lie in the checkpoint; nothing is copied but the bias.
pub struct CpuWeight {
    pub(crate) parts: Vec<Part>,
    /// `[N]`, when there is one.
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) dtype: DType,
}

/// Rows `first..first + rows` of the matrix.
pub(crate) struct Part {
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) data: Bytes,
}

impl CpuWeight {
    pub(crate) fn new(parts: &[HostMatrix], bias: &[HostTensor]) -> Result<CpuWeight> {
        let parts = parts.iter().map(|part| match part {
            HostMatrix::Dense(tensor) => Ok(tensor),
            HostMatrix::Quantized(matrix) => {
                let detail = format!("{} is {:?}", matrix.name, matrix.format);
                Err(KernelError::Unsupported { op: "weight", detail })
            }
        });
        let parts = parts.collect::<Result<Vec<&HostTensor>>>()?;
        let Some(&[_, k]) = parts.first().map(|p| p.shape.as_slice()) else {
            return Err(shape("parts", parts.first().map_or(vec![], |p| p.shape.clone()), vec![0, 0]));
        };
        let dtype = parts[0].dtype;
        let mut views = Vec::with_capacity(parts.len());
        let mut n = 0;
        for part in parts {
            let &[rows, width] = part.shape.as_slice() else {
                return Err(shape(&part.name, part.shape.clone(), vec![0, k]));
            };
            if width != k || part.data.len() != rows * k * part.dtype.size() {
                return Err(shape(&part.name, part.shape.clone(), vec![rows, k]));
            }
            if part.dtype != dtype {
                let detail = format!(
                    "{} is {:?} and stands beside {dtype:?}; convert the checkpoint",
                    part.name, part.dtype
                );
                return Err(KernelError::Unsupported { op: "weight", detail });
            }
            views.push(Part { first: n, rows, data: part.data.clone() });
            n += rows;
        }
        let bias = if bias.is_empty() { None } else { Some(stack_bias(&views, bias)?) };
        Ok(CpuWeight { parts: views, bias, n, k, dtype })
    }

    /// Output features, N.
    pub fn rows(&self) -> usize {
        self.n
    }

    /// Input features, K.
    pub fn width(&self) -> usize {
        self.k
    }

    /// Bytes of row `n`.
    pub(crate) fn row(&self, n: usize) -> &[u8] {
        let bytes = self.k * self.dtype.size();
        let i = self.parts.partition_point(|p| p.first + p.rows <= n);
        let part = &self.parts[i];
        &part.data[(n - part.first) * bytes..][..bytes]
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
