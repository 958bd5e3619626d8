//! Tensors as they lie in a checkpoint: bytes, a dtype and a shape.

use bytes::Bytes;

/// Element type of a checkpoint tensor or of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// bfloat16: 8 exponent bits, 7 mantissa bits.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// OCP 8-bit floating point with 4 exponent and 3 mantissa bits, up to 448, without infinities (Micikevicius et al. 2022).
    F8E4M3,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            DType::Bf16 | DType::F16 => 2,
            DType::F32 => 4,
            DType::F8E4M3 => 1,
        }
    }
}

/// A tensor in host memory, row-major and little-endian, usually a slice of a memory-mapped file.
///
/// Cloning is cheap: the bytes are shared. They carry no alignment promise; an op reads them with unaligned loads.
#[derive(Debug, Clone)]
pub struct HostTensor {
    /// Name in the checkpoint, for error messages.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents, slowest first. Their product times `dtype.size()` is `data.len()`.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Bytes,
}

impl HostTensor {
    /// Number of elements.
    pub fn elems(&self) -> usize {
        self.shape.iter().product()
    }

    /// All elements converted to `f32` (exact for all dtypes).
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DType::Bf16 => {
                self.data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            DType::F16 => {
                self.data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            DType::F32 => {
                self.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            DType::F8E4M3 => self.data.iter().map(|&b| f8_to_f32(b)).collect(),
        }
    }
}

/// The value of an F8E4M3 byte.
pub fn f8_to_f32(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The F8E4M3 that is nearest to a number, to even where two are. What is too large becomes ±448; NaN stays NaN.
pub fn f32_to_f8(x: f32) -> u8 {
    let (sign, magnitude) = ((x.to_bits() >> 24) as u8 & 0x80, x.abs().min(448.0));
    if x.is_nan() {
        return sign | 0x7f;
    }
    if magnitude < 1.0 / 64.0 {
        // Subnormals are multiples of 2^-9; the eighth is the first normal number.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
    sign | ((rounded >> 20) - ((127 - 7) << 3)) as u8
}

/// A matrix `[N, K]` in host memory: as it is, or quantised.
#[derive(Debug, Clone)]
pub enum HostMatrix {
    /// Two extents; bf16, f16 or f32.
    Dense(HostTensor),
    /// Small integers or small floating point numbers, and what they are multiplied with.
    Quantized(QuantMatrix),
}

impl HostMatrix {
    /// Name in the checkpoint, for error messages.
    pub fn name(&self) -> &str {
        match self {
            HostMatrix::Dense(tensor) => &tensor.name,
            HostMatrix::Quantized(matrix) => &matrix.name,
        }
    }
}

impl From<HostTensor> for HostMatrix {
    fn from(tensor: HostTensor) -> Self {
        HostMatrix::Dense(tensor)
    }
}

impl From<QuantMatrix> for HostMatrix {
    fn from(matrix: QuantMatrix) -> Self {
        HostMatrix::Quantized(matrix)
    }
}

/// A quantised matrix `[N, K]`, row-major.
#[derive(Debug, Clone)]
pub struct QuantMatrix {
    /// Name in the checkpoint, for error messages.
    pub name: String,
    /// `[N, K]`.
    pub shape: [usize; 2],
    /// How `data`, `scales` and `offsets` make the weights.
    pub format: QuantFormat,
    /// The quantised weights, as the format says.
    pub data: Bytes,
    /// f32, little-endian; empty for formats that have them in `data`.
    pub scales: Bytes,
    /// f32, little-endian, in the shape of the scales; or empty: all are 0.
    pub offsets: Bytes,
}

/// Storage of a quantised matrix. `⌈x⌉` rounds up to whole groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantFormat {
    /// `data` `[N, K]` F8E4M3, `w[n, k] = data[n, k] * scales[n / rows, k / columns]`, scales `[⌈N / rows⌉, ⌈K / columns⌉]`. No offsets.
    /// One scale for all: `rows` is N and `columns` is K.
    Fp8 {
        /// Rows that share a scale.
        rows: usize,
        /// Columns that share a scale.
        columns: usize,
    },
    /// `data` `[N, K / 2]`, the even column in the low half of a byte, from 0 to 15; `w[n, k] = q * scales[n, k / group] + offsets[n, k / group]`,
    /// scales `[N, ⌈K / group⌉]`. K is even.
    Int4 {
        /// Columns that share a scale: a multiple of 16, or K.
        group: usize,
    },
    /// `data` `[N, K]` i8; otherwise as `Int4`.
    Int8 {
        /// Columns that share a scale: a multiple of 16, or K.
        group: usize,
    },
    /// OCP MX (Rouhani et al. 2023): `data` `[N, K / 32, 17]`, of which the first byte is a scale, `2^(byte - 127)`, and the others are 32 values of E2M1, the even
    /// column in the low half of a byte. K is a multiple of 32.
    Mxfp4,
    /// Blocks of GGML.
    Ggml(GgmlType),
}

/// Block formats of GGML, as its `ggml-common.h` defines them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum GgmlType {
    /// 32 weights: an f16 scale, 16 bytes of 4 bits.
    Q4_0,
    /// 32 weights: an f16 scale, 32 signed bytes.
    Q8_0,
    /// 256 weights: f16 scale and minimum, 8 scales and minima of 6 bits, 4 bits each.
    Q4_K,
    /// 256 weights: as `Q4_K` with a fifth bit each.
    Q5_K,
    /// 256 weights of 6 bits, 16 scales of 8 bits, an f16 scale.
    Q6_K,
}

impl GgmlType {
    /// Weights in a block.
    pub const fn block(self) -> usize {
        match self {
            GgmlType::Q4_0 | GgmlType::Q8_0 => 32,
            GgmlType::Q4_K | GgmlType::Q5_K | GgmlType::Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            GgmlType::Q4_0 => 18,
            GgmlType::Q8_0 => 34,
            GgmlType::Q4_K => 144,
            GgmlType::Q5_K => 176,
            GgmlType::Q6_K => 210,
        }
    }
}

/// The matrices of one expert that are stacked into one, and their biases.
#[derive(Debug, Clone)]
pub struct ExpertParts {
    /// Each `[N_i, K]`.
    pub parts: Vec<HostMatrix>,
    /// Each `[N_i]`; as many as parts, or none.
    pub bias: Vec<HostTensor>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f8_comes_back_and_numbers_between_go_to_the_nearer() {
        for byte in 0..=255_u8 {
            let x = f8_to_f32(byte);
            assert!(f32_to_f8(x) == byte || x.is_nan() && f8_to_f32(f32_to_f8(x)).is_nan(), "{byte:#x}");
        }
        for byte in 0..0x7e_u8 {
            let (low, high) = (f8_to_f32(byte), f8_to_f32(byte + 1));
            let middle = f32::midpoint(low, high);
            let even = if byte.is_multiple_of(2) { byte } else { byte + 1 };
            assert_eq!(f32_to_f8(middle), even, "{middle}");
            assert_eq!([f32_to_f8(middle.next_down()), f32_to_f8(middle.next_up())], [byte, byte + 1]);
            assert_eq!(f32_to_f8(-middle), even | 0x80);
        }
        assert_eq!([448.1, 1e30, f32::INFINITY].map(f32_to_f8), [0x7e; 3]);
        assert_eq!([-470.0, f32::NEG_INFINITY].map(f32_to_f8), [0xfe; 2]);
        assert!(f8_to_f32(f32_to_f8(f32::NAN)).is_nan());
    }
}
