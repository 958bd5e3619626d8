//! Rows of matrices in host memory: cut out, put in another order, transposed.

use std::ops::Range;

use bytes::Bytes;
use tidemill_kernels::{
    DType, KernelError,
    tensor::{HostMatrix, HostTensor, QuantFormat, QuantMatrix, f8_to_f32},
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

/// A matrix whose elements are to be put in other places: quantised ones become f32.
///
/// # Errors
/// For formats whose elements are packed in blocks of several scales.
pub(super) fn dense(matrix: HostMatrix) -> Result<HostTensor, KernelError> {
    let matrix = match matrix {
        HostMatrix::Dense(tensor) => return Ok(tensor),
        HostMatrix::Quantized(matrix) => matrix,
    };
    let [n, k] = matrix.shape;
    let (rows, columns) = match matrix.format {
        QuantFormat::Fp8 { rows, columns } => (rows, columns),
        QuantFormat::Int4 { group } | QuantFormat::Int8 { group } => (1, group),
        other => {
            return Err(KernelError::Unsupported {
                op: "latent_attention",
                detail: format!(
                    "{} is stored as {other:?}; take a checkpoint in bf16, fp8 or int8",
                    matrix.name
                ),
            });
        }
    };
    let (scales, offsets) = (floats(&matrix.scales), floats(&matrix.offsets));
    let element = |at: usize| match matrix.format {
        QuantFormat::Fp8 { .. } => f8_to_f32(matrix.data[at]),
        QuantFormat::Int8 { .. } => f32::from(matrix.data[at] as i8),
        // The even column is in the low half of a byte.
        _ => f32::from(matrix.data[at / 2] >> (at % 2 * 4) & 15),
    };
    let mut data = Vec::with_capacity(n * k * size_of::<f32>());
    for row in 0..n {
        for column in 0..k {
            let group = row / rows * k.div_ceil(columns) + column / columns;
            let offset = offsets.get(group).copied().unwrap_or(0.0);
            let value = element(row * k + column) * scales[group] + offset;
            data.extend_from_slice(&value.to_le_bytes());
        }
    }
    Ok(HostTensor { name: matrix.name, dtype: DType::F32, shape: vec![n, k], data: data.into() })
}

fn floats(bytes: &Bytes) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Bytes {
        values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn quantized(format: QuantFormat, data: &[u8], scales: &[f32], offsets: &[f32]) -> HostMatrix {
        HostMatrix::Quantized(QuantMatrix {
            name: "w".into(),
            shape: [4, 2],
            format,
            data: data.to_vec().into(),
            scales: bytes(scales),
            offsets: bytes(offsets),
        })
    }

    fn values(matrix: HostMatrix) -> Vec<f32> {
        dense(matrix).unwrap().to_f32()
    }

    #[test]
    fn quantised_elements_are_what_their_format_says() {
        // 0x38 is 1, 0x40 is 2, 0xb8 is -1.
        let data = [0x38, 0x40, 0xb8, 0x38, 0x40, 0x40, 0x38, 0xb8];
        let blocks = quantized(QuantFormat::Fp8 { rows: 2, columns: 1 }, &data, &[1.0, 2.0, 3.0, 4.0], &[]);
        assert_eq!(values(blocks), [1.0, 4.0, -1.0, 2.0, 6.0, 8.0, 3.0, -4.0]);
        let int4 = quantized(
            QuantFormat::Int4 { group: 2 },
            &[0x21, 0x43, 0x05, 0xf0],
            &[1.0, 2.0, 1.0, 1.0],
            &[0.0, -1.0, 0.0, 0.5],
        );
        assert_eq!(values(int4), [1.0, 2.0, 5.0, 7.0, 5.0, 0.0, 0.5, 15.5]);
        let int8 = quantized(
            QuantFormat::Int8 { group: 2 },
            &[1, 255, 2, 3, 4, 5, 6, 7],
            &[1.0, 2.0, 1.0, 1.0],
            &[],
        );
        assert_eq!(values(int8), [1.0, -1.0, 4.0, 6.0, 4.0, 5.0, 6.0, 7.0]);
        assert!(dense(quantized(QuantFormat::Mxfp4, &[0; 8], &[], &[])).is_err());
    }

    #[test]
    fn rows_are_taken_with_their_scales() {
        let data = [0x38, 0x40, 0xb8, 0x38, 0x40, 0x40, 0x38, 0xb8];
        let blocks = quantized(QuantFormat::Fp8 { rows: 2, columns: 1 }, &data, &[1.0, 2.0, 3.0, 4.0], &[]);
        let all = values(blocks.clone());
        let taken = values(take_rows(&blocks, &[3..4, 1..2]).unwrap());
        assert_eq!(taken, [&all[6..8], &all[2..4]].concat());
        let one = quantized(QuantFormat::Fp8 { rows: 4, columns: 2 }, &data, &[0.5], &[]);
        assert_eq!(values(take_rows(&one, std::slice::from_ref(&(1..3))).unwrap()), [-0.5, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn a_transposed_matrix_is_its_own_transpose_twice() {
        let tensor = HostTensor {
            name: "w".into(),
            dtype: DType::F32,
            shape: vec![2, 3],
            data: bytes(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        };
        let once = transposed(&tensor);
        assert_eq!((&once.shape[..], once.to_f32()), (&[3, 2][..], vec![1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
        assert_eq!(transposed(&once).to_f32(), tensor.to_f32());
    }
}
