//! Quantised matrices of the host: how the device has them, and their rows as it wants them.

use half::bf16;

use super::ggml;
use crate::{
    cuda::{
        driver::Result,
        matrix::{Code, Coding},
    },
    error::KernelError,
    tensor::{GgmlType, QuantFormat, QuantMatrix, f8_to_f32},
};

/// A quantised matrix whose extents were checked.
pub(super) struct Source<'a> {
    matrix: &'a QuantMatrix,
    /// Bytes of a row of `data`.
    row_bytes: usize,
    /// Whether every offset is `-8 * scale`: 4 bits from -8 to 7.
    centred: bool,
}

impl<'a> Source<'a> {
    /// # Errors
    /// [`KernelError::Shape`] where data, scales or offsets have another length than the format says; [`KernelError::Unsupported`] for
    /// extents that the format does not allow.
    pub(super) fn new(op: &'static str, matrix: &'a QuantMatrix) -> Result<Self> {
        let QuantMatrix { name, shape: [n, k], format, data, scales, offsets } = matrix;
        let (n, k) = (*n, *k);
        let odd_group = |columns: usize| columns == 0 || !(columns.is_multiple_of(16) || columns >= k);
        let (row_bytes, floats) = match *format {
            QuantFormat::Fp8 { rows, columns } if rows == 0 || odd_group(columns) => {
                return Err(refused(op, matrix, "a block has rows, and columns in multiples of 16 or all"));
            }
            QuantFormat::Int4 { group } | QuantFormat::Int8 { group } if odd_group(group) => {
                return Err(refused(op, matrix, "a group has columns in multiples of 16, or all"));
            }
            QuantFormat::Int4 { .. } if !k.is_multiple_of(2) => {
                return Err(refused(op, matrix, "the width is odd"));
            }
            QuantFormat::Mxfp4 if !k.is_multiple_of(32) => {
                return Err(refused(op, matrix, "the width is no multiple of 32"));
            }
            QuantFormat::Ggml(ty) if !k.is_multiple_of(ty.block()) => {
                return Err(refused(op, matrix, "the width is no multiple of a block"));
            }
            QuantFormat::Fp8 { rows, columns } => (k, n.div_ceil(rows).saturating_mul(k.div_ceil(columns))),
            QuantFormat::Int4 { group } => (k / 2, n.saturating_mul(k.div_ceil(group))),
            QuantFormat::Int8 { group } => (k, n.saturating_mul(k.div_ceil(group))),
            QuantFormat::Mxfp4 => (k / 32 * 17, 0),
            QuantFormat::Ggml(ty) => (k / ty.block() * ty.block_bytes(), 0),
        };
        let has_offsets = matches!(format, QuantFormat::Int4 { .. } | QuantFormat::Int8 { .. });
        let floats = floats.saturating_mul(4);
        let expected = [
            n.saturating_mul(row_bytes),
            floats,
            if has_offsets && !offsets.is_empty() { floats } else { 0 },
        ];
        let got = [data.len(), scales.len(), offsets.len()];
        if got != expected {
            let what = format!("{name}: bytes of data, scales and offsets");
            let (got, expected) = (got.into(), expected.into());
            return Err(KernelError::Shape { op, what, got, expected });
        }
        let mut source = Self { matrix, row_bytes, centred: false };
        source.centred = source.is_centred();
        Ok(source)
    }

    /// Name in the checkpoint, for error messages.
    pub(super) fn name(&self) -> &str {
        &self.matrix.name
    }

    /// `[N, K]`.
    pub(super) fn shape(&self) -> [usize; 2] {
        self.matrix.shape
    }

    /// How the device has it, or nothing where it has it in bf16: its kernels take whole blocks of 32 columns.
    pub(super) fn coding(&self) -> Option<Coding> {
        let k = self.matrix.shape[1];
        let (code, group, offsets) = match self.matrix.format {
            QuantFormat::Fp8 { columns, .. } => (Code::Fp8, columns, false),
            QuantFormat::Int4 { group } => (Code::Int4, group, !self.centred),
            QuantFormat::Int8 { group } => (Code::Int8, group, !self.matrix.offsets.is_empty()),
            QuantFormat::Mxfp4 => (Code::Mxfp4, 32, false),
            QuantFormat::Ggml(GgmlType::Q4_0) => (Code::Int4, 32, false),
            QuantFormat::Ggml(GgmlType::Q4_K) => (Code::Int4, 32, true),
            QuantFormat::Ggml(GgmlType::Q8_0) => (Code::Int8, 32, false),
            QuantFormat::Ggml(GgmlType::Q5_K) => (Code::Int8, 32, true),
            QuantFormat::Ggml(GgmlType::Q6_K) => (Code::Int8, 16, false),
        };
        // Groups that no power of two divides well are cut into smaller ones with the same scale.
        let group = if group >= k { k.next_power_of_two().max(32) } else { 1 << group.trailing_zeros() };
        (k > 0 && k.is_multiple_of(32)).then_some(Coding { code, group, offsets })
    }

    /// The codes of a row.
    pub(super) fn codes(&self, row: usize, coding: Coding, out: &mut [u8]) {
        let data = self.row(row);
        match (coding.code, self.matrix.format) {
            (Code::Mxfp4, _) => {
                for (out, block) in out.chunks_exact_mut(16).zip(data.chunks_exact(17)) {
                    out.copy_from_slice(&block[1..]);
                }
            }
            (Code::Fp8, _)
            | (Code::Int4, QuantFormat::Int4 { .. })
            | (Code::Int8, QuantFormat::Int8 { .. }) => {
                out.copy_from_slice(data);
            }
            (Code::Int4, _) => {
                let q = self.integers(row);
                out.iter_mut().zip(q.chunks_exact(2)).for_each(|(b, q)| *b = q[0] as u8 | (q[1] as u8) << 4);
            }
            (Code::Int8, _) => {
                let zero = if self.is_four_bits() && !coding.offsets { 8 } else { 0 };
                out.iter_mut().zip(self.integers(row)).for_each(|(b, q)| *b = (q - zero) as u8);
            }
        }
    }

    /// The scales, and offsets, of a row.
    pub(super) fn scales(&self, row: usize, coding: Coding, out: &mut [u8]) {
        if coding.code == Code::Mxfp4 {
            out.fill(0);
            out.iter_mut().zip(self.row(row).chunks_exact(17)).for_each(|(out, block)| *out = block[0]);
            return;
        }
        let words = if coding.offsets { 2 } else { 1 };
        for (i, out) in out.chunks_exact_mut(4 * words).enumerate() {
            let affine = self.affine(row, i * coding.group);
            out.chunks_exact_mut(4).zip(affine).for_each(|(out, v)| out.copy_from_slice(&v.to_le_bytes()));
        }
    }

    /// A row in bf16.
    pub(super) fn widen(&self, row: usize, out: &mut [u8]) {
        let values: Vec<f32> = match self.matrix.format {
            QuantFormat::Fp8 { .. } => self.row(row).iter().map(|&b| f8_to_f32(b)).collect(),
            QuantFormat::Mxfp4 => {
                let halves = |b: &u8| [e2m1(b & 15), e2m1(b >> 4)];
                self.row(row).chunks_exact(17).flat_map(|block| block[1..].iter().flat_map(halves)).collect()
            }
            _ => self.integers(row).into_iter().map(f32::from).collect(),
        };
        // Every format's groups are runs of 16 columns, or of several times 16.
        for (i, (out, values)) in out.chunks_mut(32).zip(values.chunks(16)).enumerate() {
            let [scale, offset] = self.affine(row, i * 16);
            for (out, value) in out.chunks_exact_mut(2).zip(values) {
                out.copy_from_slice(&bf16::from_f32(value.mul_add(scale, offset)).to_le_bytes());
            }
        }
    }

    fn row(&self, row: usize) -> &[u8] {
        &self.matrix.data[row * self.row_bytes..][..self.row_bytes]
    }

    fn is_four_bits(&self) -> bool {
        use GgmlType::{Q4_0, Q4_K};
        matches!(self.matrix.format, QuantFormat::Int4 { .. } | QuantFormat::Ggml(Q4_0 | Q4_K))
    }

    fn is_centred(&self) -> bool {
        let QuantMatrix { scales, offsets, .. } = self.matrix;
        !offsets.is_empty() && (0..scales.len() / 4).all(|i| float(offsets, i) == -8.0 * float(scales, i))
    }

    /// The integers of a row: 0 to 15 for formats of 4 bits, signed for others.
    fn integers(&self, row: usize) -> Vec<i8> {
        let data = self.row(row);
        match self.matrix.format {
            QuantFormat::Int4 { .. } => data.iter().flat_map(|b| [(b & 15) as i8, (b >> 4) as i8]).collect(),
            QuantFormat::Ggml(ty) => {
                let mut q = vec![0; self.matrix.shape[1]];
                for (q, block) in q.chunks_exact_mut(ty.block()).zip(data.chunks_exact(ty.block_bytes())) {
                    ggml::integers(ty, block, q);
                }
                q
            }
            _ => data.iter().map(|&b| b as i8).collect(),
        }
    }

    /// Scale and offset of the weight in column `k` of a row.
    fn affine(&self, row: usize, k: usize) -> [f32; 2] {
        let QuantMatrix { shape: [_, width], format, scales, offsets, .. } = self.matrix;
        match *format {
            QuantFormat::Fp8 { rows, columns } => {
                [float(scales, row / rows * width.div_ceil(columns) + k / columns), 0.0]
            }
            QuantFormat::Int4 { group } | QuantFormat::Int8 { group } => {
                let i = row * width.div_ceil(group) + k / group;
                [float(scales, i), if offsets.is_empty() { 0.0 } else { float(offsets, i) }]
            }
            QuantFormat::Mxfp4 => [mx_scale(self.row(row)[k / 32 * 17]), 0.0],
            QuantFormat::Ggml(ty) => {
                let block = &self.row(row)[k / ty.block() * ty.block_bytes()..][..ty.block_bytes()];
                ggml::affine(ty, block, k % ty.block())
            }
        }
    }
}

/// A coding that both can be brought to without loss.
pub(super) fn common(a: Coding, b: Coding) -> Option<Coding> {
    let code = match (a.code, b.code) {
        _ if a.code == b.code => a.code,
        (Code::Int4, Code::Int8) | (Code::Int8, Code::Int4) => Code::Int8,
        _ => return None,
    };
    Some(Coding { code, group: a.group.min(b.group), offsets: a.offsets || b.offsets })
}

fn refused(op: &'static str, matrix: &QuantMatrix, detail: &str) -> KernelError {
    let QuantMatrix { name, shape, format, .. } = matrix;
    KernelError::Unsupported { op, detail: format!("{name} {shape:?} is {format:?}: {detail}") }
}

fn float(bytes: &[u8], i: usize) -> f32 {
    let at = &bytes[4 * i..4 * i + 4];
    f32::from_le_bytes([at[0], at[1], at[2], at[3]])
}

fn e2m1(code: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// `2^(byte - 127)`; 255 is no number.
fn mx_scale(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}
