//! What the tests of all ops share: random data, devices to test, comparisons.
#![allow(dead_code)]

use bytes::Bytes;
use tidemill_kernels::{
    DType, HostTensor, Ops,
    cpu::{Compute, CpuBuffer, CpuConfig, CpuOps, Isa},
    ops::{QkTransform, Rotary, Scoring},
    tensor::f32_to_f8,
};

/// A small random generator (xorshift64*, Vigna 2016).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    /// Uniform in -1..1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn units(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

/// A device for every instruction set of this CPU, with `threads`.
pub fn devices(compute: Compute, threads: usize) -> Vec<CpuOps> {
    let config = |isa| CpuConfig { compute, isa: Some(isa), threads: Some(threads) };
    Isa::available().into_iter().map(|isa| CpuOps::new(config(isa)).unwrap()).collect()
}

/// A buffer that holds `values`.
pub fn buffer(ops: &CpuOps, values: &[f32]) -> CpuBuffer {
    let mut b = ops.buffer(values.len()).unwrap();
    b.as_mut_slice()[..values.len()].copy_from_slice(values);
    b
}

/// A buffer of NaN: what an op leaves unwritten shows.
pub fn poisoned(ops: &CpuOps, elems: usize) -> CpuBuffer {
    buffer(ops, &vec![f32::NAN; elems])
}

/// A checkpoint tensor, `skew` bytes off any alignment.
pub fn tensor(dtype: DType, shape: &[usize], values: &[f32], skew: usize) -> HostTensor {
    assert_eq!(values.len(), shape.iter().product::<usize>());
    let mut data = vec![0xff; skew];
    for &v in values {
        match dtype {
            DType::Bf16 => data.extend(half::bf16::from_f32(v).to_le_bytes()),
            DType::F16 => data.extend(half::f16::from_f32(v).to_le_bytes()),
            DType::F32 => data.extend(v.to_le_bytes()),
            DType::F8E4M3 => data.push(f32_to_f8(v)),
        }
    }
    HostTensor { name: "test".into(), dtype, shape: shape.to_vec(), data: Bytes::from(data).slice(skew..) }
}

/// `x` as the device sees it in a product with bf16 weights.
pub fn rounded(x: &[f32], compute: Compute, dtype: DType) -> Vec<f32> {
    let bf16 = compute == Compute::Bf16 && dtype == DType::Bf16;
    x.iter().map(|&v| if bf16 { half::bf16::from_f32(v).to_f32() } else { v }).collect()
}

/// Rotation of whole heads by a table, and nothing else.
pub fn rotation<V>(table: &V, dim: usize) -> QkTransform<'_, V> {
    QkTransform { norm: None, rotary: Some(Rotary { table, dim, interleaved: false }) }
}

/// Causal attention without anything else.
pub fn causal<'a, V>(scale: f32) -> Scoring<'a, V> {
    Scoring { scale, window: None, soft_cap: None, slopes: None, sinks: None, causal: true }
}

/// Every element within `tolerance`, and none NaN.
#[track_caller]
pub fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(g) - w).abs() <= tolerance, "{what}: element {i} is {g}, expected {w}");
    }
}

/// The same bits.
#[track_caller]
pub fn assert_same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert_eq!(g.to_bits(), w.to_bits(), "{what}: element {i} is {g}, expected {w}");
    }
}
