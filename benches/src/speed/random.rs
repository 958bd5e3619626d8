//! Random numbers in the shape of checkpoints, without files.

use std::cell::Cell;

use bytes::Bytes;
use half::bf16;
use tidemill_engine::{LoadError, model::checkpoint::Tensors};
use tidemill_kernels::{
    DType, HostTensor,
    tensor::{QuantFormat, QuantMatrix},
};

/// Tensors begin at multiples of this many bytes of the pool.
const STEP: usize = 4096;
/// The pool is that much larger than the largest tensor, so that tensors differ.
const SLACK: usize = 64 << 20;

/// A pool of random bf16 numbers. Every tensor is a slice of it, each from another place: what is made once serves models of any
/// size, and no two matrices that follow each other are equal.
pub struct RandomTensors {
    pool: Bytes,
    next: Cell<usize>,
}

impl RandomTensors {
    /// A pool for tensors of up to `largest` elements, uniform in `-scale..scale`, made by all cores.
    pub fn new(largest: usize, scale: f32) -> Self {
        let bytes = 2 * largest + SLACK.min(largest.next_multiple_of(STEP / 2) * 2);
        let mut pool = vec![0_u8; bytes.next_multiple_of(STEP)];
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let part = pool.len().div_ceil(cores).next_multiple_of(STEP);
        std::thread::scope(|scope| {
            for (index, part) in pool.chunks_mut(part).enumerate() {
                scope.spawn(move || fill(part, index as u64 + 1, scale));
            }
        });
        Self { pool: pool.into(), next: Cell::new(0) }
    }

    /// The next tensor.
    pub fn matrix(&self, rows: usize, columns: usize) -> HostTensor {
        let len = 2 * rows * columns;
        let at = self.next.get();
        // A prime number of steps further on each time, over all places where the tensor fits.
        self.next.set(at + 4099 * STEP);
        let places = (self.pool.len() - len) / STEP + 1;
        let start = at / STEP % places * STEP;
        let data = self.pool.slice(start..start + len);
        HostTensor { name: "random".into(), dtype: DType::Bf16, shape: vec![rows, columns], data }
    }
}

impl RandomTensors {
    /// The next tensor, its bytes understood as a format of 8 or 4 bits a weight whose scales stand beside it.
    pub fn quantized(&self, format: QuantFormat, [rows, columns]: [usize; 2]) -> QuantMatrix {
        let len = |bits: usize| rows * columns * bits / 8;
        let (bytes, scales) = match format {
            QuantFormat::Fp8 { rows: r, columns: c } => (len(8), rows.div_ceil(r) * columns.div_ceil(c)),
            QuantFormat::Int8 { group } => (len(8), rows * columns.div_ceil(group)),
            QuantFormat::Int4 { group } => (len(4), rows * columns.div_ceil(group)),
            QuantFormat::Mxfp4 => (len(4) / 16 * 17, 0),
            QuantFormat::Ggml(ty) => (rows * columns / ty.block() * ty.block_bytes(), 0),
        };
        let data = self.matrix(bytes.div_ceil(2), 1).data.slice(..bytes);
        // No byte of F8E4M3 that is no number.
        let data = match format {
            QuantFormat::Fp8 { .. } => data.iter().map(|byte| byte & 0xbf).collect::<Vec<_>>().into(),
            _ => data,
        };
        let scales = vec![0.01_f32.to_le_bytes(); scales].concat().into();
        let (name, offsets) = ("random".into(), Bytes::new());
        QuantMatrix { name, shape: [rows, columns], format, data, scales, offsets }
    }
}

/// A model's tensors. Norm weights are ones, so that activations keep their size.
impl Tensors for RandomTensors {
    fn tensor(&self, name: &str, expected_shape: &[usize]) -> Result<HostTensor, LoadError> {
        let mut tensor = match *expected_shape {
            [rows, columns] => self.matrix(rows, columns),
            _ => {
                let elems = expected_shape.iter().product();
                let ones: Vec<u8> = std::iter::repeat_n(bf16::ONE.to_le_bytes(), elems).flatten().collect();
                let (name, shape) = (String::new(), Vec::new());
                HostTensor { name, dtype: DType::Bf16, shape, data: ones.into() }
            }
        };
        tensor.name = name.into();
        tensor.shape = expected_shape.to_vec();
        Ok(tensor)
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): one state gives four numbers.
fn fill(out: &mut [u8], seed: u64, scale: f32) {
    let mut state = seed << 48;
    for eight in out.chunks_exact_mut(8) {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let z = z ^ (z >> 31);
        for (i, two) in eight.chunks_exact_mut(2).enumerate() {
            let unit = f32::from((z >> (16 * i)) as u16) / 32768.0 - 1.0;
            two.copy_from_slice(&bf16::from_f32(unit * scale).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_differ_are_centred_and_fill_their_shape() {
        let random = RandomTensors::new(1 << 16, 0.5);
        let (a, b) = (random.matrix(256, 256), random.matrix(256, 256));
        assert_eq!(a.data.len(), 2 << 16);
        assert_ne!(a.data, b.data);
        let values = a.to_f32();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        // Uniform in -1/2..1/2: variance 1/12.
        assert!(mean.abs() < 0.01 && (square * 12.0 - 1.0).abs() < 0.02, "mean {mean}, mean square {square}");
        assert!(values.iter().all(|v| v.abs() <= 0.5));
    }
}
