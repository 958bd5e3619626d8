//! Rows of matrices in host memory: cut out, put in another order, transposed.

use std::ops::Range;

use bytes::Bytes;
use tidemill_kernels::{
    KernelError,
    tensor::{HostMatrix, HostTensor, QuantFormat, QuantMatrix},
};

/// The matrix of these rows, in this order. Rows that lie in order are a view.
pub(crate) fn take_rows(matrix: &HostMatrix, ranges: &[Range<usize>]) -> Result<HostMatrix, KernelError> {
    match matrix {
        HostMatrix::Dense(tensor) => {
            let (n, k) = (tensor.shape[0], tensor.shape[1]);
            let data = take(&tensor.data, n, ranges);
            Ok(HostMatrix::Dense(HostTensor { shape: vec![count(ranges), k], data, ..tensor.clone() }))
        }
        HostMatrix::Quantized(matrix) => {
            let QuantMatrix { shape: [n, k], format, .. } = *matrix;
            let (format, scales) = match format {
                QuantFormat::Fp8 { rows, columns } => {
                    let scales = scale_each_row(matrix, rows);
                    (QuantFormat::Fp8 { rows: 1, columns }, take(&scales, n, ranges))
                }
                other => (other, take(&matrix.scales, n, ranges)),
            };
            Ok(HostMatrix::Quantized(QuantMatrix {
                shape: [count(ranges), k],
                format,
                data: take(&matrix.data, n, ranges),
                scales,
                offsets: take(&matrix.offsets, n, ranges),
                ..matrix.clone()
            }))
        }
    }
}

/// These elements of a vector.
pub(super) fn take_elements(vector: &HostTensor, ranges: &[Range<usize>]) -> HostTensor {
    let data = take(&vector.data, vector.shape[0], ranges);
    HostTensor { shape: vec![count(ranges)], data, ..vector.clone() }
}

/// Slice `index` of a tensor along its first axis.
pub(super) fn slice(tensor: &HostTensor, index: usize) -> HostTensor {
    let bytes = tensor.data.len() / tensor.shape[0];
    let data = tensor.data.slice(index * bytes..(index + 1) * bytes);
    HostTensor { shape: tensor.shape[1..].to_vec(), data, ..tensor.clone() }
}

/// `[K, N]` from `[N, K]`.
pub(crate) fn transposed(tensor: &HostTensor) -> HostTensor {
    let (n, k, size) = (tensor.shape[0], tensor.shape[1], tensor.dtype.size());
    let mut data = Vec::with_capacity(tensor.data.len());
    for column in 0..k {
        for row in 0..n {
            data.extend_from_slice(&tensor.data[(row * k + column) * size..][..size]);
        }
    }
    HostTensor { shape: vec![k, n], data: data.into(), ..tensor.clone() }
}

/// A matrix whose elements are to be put in other places.
///
/// # Errors
/// For a quantised one, whose groups of elements cannot be torn apart.
pub(super) fn dense(matrix: HostMatrix) -> Result<HostTensor, KernelError> {
    match matrix {
        HostMatrix::Dense(tensor) => Ok(tensor),
        HostMatrix::Quantized(matrix) => Err(KernelError::Unsupported {
            op: "latent_attention",
            detail: format!("{} is stored as {:?}; it must be bf16, f16 or f32", matrix.name, matrix.format),
        }),
    }
}

fn count(ranges: &[Range<usize>]) -> usize {
    ranges.iter().map(ExactSizeIterator::len).sum()
}

/// The bytes of these rows out of `n`.
fn take(data: &Bytes, n: usize, ranges: &[Range<usize>]) -> Bytes {
    let bytes = data.len() / n;
    if let [one] = ranges {
        return data.slice(one.start * bytes..one.end * bytes);
    }
    let mut taken = Vec::with_capacity(count(ranges) * bytes);
    for range in ranges {
        taken.extend_from_slice(&data[range.start * bytes..range.end * bytes]);
    }
    taken.into()
}

/// Scales that `rows` rows share, written out for each of them.
fn scale_each_row(matrix: &QuantMatrix, rows: usize) -> Bytes {
    let n = matrix.shape[0];
    let bytes = matrix.scales.len() / n.div_ceil(rows);
    let of_row = |row: usize| &matrix.scales[row / rows * bytes..][..bytes];
    (0..n).flat_map(of_row).copied().collect::<Vec<u8>>().into()
}
