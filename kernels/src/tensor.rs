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
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            DType::Bf16 | DType::F16 => 2,
            DType::F32 => 4,
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

    /// All elements converted to `f32` (exact for all three dtypes).
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
        }
    }
}
