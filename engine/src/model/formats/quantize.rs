//! Matrices that are quantised as they are loaded (`--quantization`): those of linear layers, as vLLM does it. Embeddings, norms, routers and the output layer
//! stay as they are stored.
//!
//! `int8` has a scale for each 128 columns of a row (or 64, 32 or 16, as the width allows): of weights that are distributed normally, the largest of 128 lies at
//! 2.6 standard deviations, that of a row of 4096 at 3.9, and the error of rounding is proportional to it. That costs 3 % more memory than a scale for each row.
//! `fp8` has a scale for each row: the relative error of a float does not depend on it.

use bytes::Bytes;
use tidemill_kernels::tensor::{DType, HostMatrix, HostTensor, QuantFormat, QuantMatrix, f32_to_f8};

use super::raw::{float_bytes, repacked};
use crate::{config::Quantization, error::LoadError, model::checkpoint::Tensors};

/// The tensors of a checkpoint, its matrices quantised.
pub(crate) struct Quantized<'a> {
    /// The checkpoint.
    pub tensors: &'a dyn Tensors,
    /// To what.
    pub to: Quantization,
}

/// Last parts of names that stay as they are stored: embeddings, output layers, routers, the gates of shared experts, and what latent attention takes apart.
const KEPT: [&str; 16] = [
    "embed_tokens",
    "embed_in",
    "embed_out",
    "wte",
    "wpe",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "tok_embeddings",
    "lm_head",
    "output",
    "gate",
    "router",
    "shared_expert_gate",
    "kv_b_proj",
    "score",
];

/// The largest number of a signed byte, also in the negative.
const INT8_MAX: f32 = 127.0;
/// The largest F8E4M3.
const FP8_MAX: f32 = 448.0;

impl Tensors for Quantized<'_> {
    fn tensor(&self, name: &str, expected_shape: &[usize]) -> Result<HostTensor, LoadError> {
        self.tensors.tensor(name, expected_shape)
    }

    fn matrix(&self, name: &str, expected_shape: [usize; 2]) -> Result<HostMatrix, LoadError> {
        let matrix = self.tensors.matrix(name, expected_shape)?;
        let last = name.rsplit('.').next().unwrap_or(name);
        if KEPT.contains(&last) { Ok(matrix) } else { self.quantize(matrix) }
    }

    fn experts(&self, name: &str, extents: [usize; 3]) -> Result<Vec<HostMatrix>, LoadError> {
        self.tensors.experts(name, extents)?.into_iter().map(|matrix| self.quantize(matrix)).collect()
    }
}

impl Quantized<'_> {
    fn quantize(&self, matrix: HostMatrix) -> Result<HostMatrix, LoadError> {
        let HostMatrix::Dense(tensor) = matrix else { return Ok(matrix) };
        let &[n, k] = tensor.shape.as_slice() else { return Ok(tensor.into()) };
        if tensor.dtype == DType::F8E4M3 || n * k == 0 {
            return Ok(tensor.into());
        }
        let to = self.to;
        let (group, max) = match to {
            Quantization::Int8 => (int8_group(k), INT8_MAX),
            Quantization::Fp8 => (k, FP8_MAX),
        };
        let row = |row: usize| widened(&tensor, row * k..(row + 1) * k);
        let scales: Vec<f32> = {
            use rayon::prelude::*;
            let of_row = |n: usize| row(n).chunks(group).map(|part| scale(part, max)).collect::<Vec<_>>();
            (0..n).into_par_iter().flat_map_iter(of_row).collect()
        };
        let groups = k.div_ceil(group);
        let data = repacked(n * k, k, |n, out| {
            let values = row(n);
            for (i, (values, out)) in values.chunks(group).zip(out.chunks_mut(group)).enumerate() {
                let scale = scales[n * groups + i];
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                for (x, o) in values.iter().zip(out) {
                    *o = match to {
                        Quantization::Int8 => (x * inverse).round_ties_even() as i8 as u8,
                        Quantization::Fp8 => f32_to_f8(x * inverse),
                    };
                }
            }
        })?;
        let format = match to {
            Quantization::Int8 => QuantFormat::Int8 { group },
            Quantization::Fp8 => QuantFormat::Fp8 { rows: 1, columns: k },
        };
        let (scales, offsets) = (float_bytes(scales), Bytes::new());
        Ok(QuantMatrix { name: tensor.name, shape: [n, k], format, data, scales, offsets }.into())
    }
}

/// Columns that share a scale.
fn int8_group(k: usize) -> usize {
    [128, 64, 32, 16].into_iter().find(|group| k.is_multiple_of(*group)).unwrap_or(k)
}

/// What the largest number, which becomes `max`, is to be multiplied with. Where that is no number, neither is the scale.
fn scale(values: &[f32], max: f32) -> f32 {
    let largest = values.iter().fold(0.0_f32, |all, x| if x.is_nan() { f32::NAN } else { all.max(x.abs()) });
    // Subnormal scales would have no inverse.
    if largest > 0.0 { (largest / max).max(f32::MIN_POSITIVE) } else { largest }
}

/// Elements of a dense tensor as f32.
fn widened(tensor: &HostTensor, elems: std::ops::Range<usize>) -> Vec<f32> {
    let size = tensor.dtype.size();
    let data = tensor.data.slice(elems.start * size..elems.end * size);
    HostTensor { name: String::new(), dtype: tensor.dtype, shape: vec![elems.len()], data }.to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct One(HostTensor);

    impl Tensors for One {
        fn tensor(&self, _: &str, _: &[usize]) -> Result<HostTensor, LoadError> {
            Ok(self.0.clone())
        }
    }

    fn quantized(values: &[f32], k: usize, to: Quantization, name: &str) -> HostMatrix {
        let data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let shape = vec![values.len() / k, k];
        let one = One(HostTensor { name: name.into(), dtype: DType::F32, shape, data });
        Quantized { tensors: &one, to }.matrix(name, [values.len() / k, k]).unwrap()
    }

    #[test]
    fn numbers_come_back_within_half_a_step() {
        let k = 160;
        let values: Vec<f32> = (0..3 * k).map(|i| ((i * 7919) % 1001) as f32 / 500.0 - 1.0).collect();
        for (to, step) in [(Quantization::Int8, 0.5 / 127.0), (Quantization::Fp8, 1.0 / 16.0)] {
            let HostMatrix::Quantized(m) = quantized(&values, k, to, "layers.0.q_proj") else { panic!() };
            let scales: Vec<f32> = m.scales.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let per_row = scales.len() / 3;
            for (i, &x) in values.iter().enumerate() {
                let scale = scales[i / k * per_row + i % k * per_row / k];
                let y = match to {
                    Quantization::Int8 => f32::from(m.data[i] as i8) * scale,
                    Quantization::Fp8 => tidemill_kernels::tensor::f8_to_f32(m.data[i]) * scale,
                };
                let bound = if to == Quantization::Int8 { step * 1.001 } else { step * x.abs() + 1e-5 };
                assert!((x - y).abs() <= bound, "{to:?}: {x} became {y}");
            }
            assert!(matches!(
                m.format,
                QuantFormat::Int8 { group: 32 } | QuantFormat::Fp8 { rows: 1, columns: 160 }
            ));
        }
    }

    #[test]
    fn routers_and_output_layers_are_kept_and_zeros_stay_zeros() {
        for name in ["lm_head", "model.layers.3.mlp.gate", "model.layers.3.mlp.router"] {
            assert!(
                matches!(quantized(&[1.0; 32], 32, Quantization::Int8, name), HostMatrix::Dense(_)),
                "{name}"
            );
        }
        for to in [Quantization::Int8, Quantization::Fp8] {
            let HostMatrix::Quantized(m) = quantized(&[0.0; 64], 32, to, "up_proj") else { panic!() };
            assert!(m.data.iter().all(|b| *b == 0) && m.scales.iter().all(|b| *b == 0));
        }
    }
}
