//! `Ops::linear` against f64, and its promise that a row's bits do not depend on the batch.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Rng, assert_close, assert_same, buffer, devices, poisoned, rounded, tensor};
use proptest::prelude::*;
use tidemill_kernels::{
    DType, KernelError, Ops,
    cpu::{Compute, CpuOps, CpuWeight},
    ops::Epilogue,
    tensor::HostMatrix,
};

const DTYPES: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

/// Stacked parts of random weights with biases, and what they hold as f32.
struct Matrix {
    weight: CpuWeight,
    values: Vec<f32>,
    bias: Vec<f32>,
    n: usize,
    k: usize,
}

fn matrix(
    ops: &CpuOps,
    dtype: DType,
    parts: &[usize],
    k: usize,
    skew: usize,
    with_bias: bool,
    seed: u64,
) -> Matrix {
    let mut rng = Rng::new(seed);
    let n = parts.iter().sum();
    let (mut tensors, mut biases, mut values, mut bias) = (vec![], vec![], vec![], vec![]);
    for &rows in parts {
        let t = tensor(dtype, &[rows, k], &rng.units(rows * k), skew);
        values.extend(t.to_f32());
        tensors.push(HostMatrix::from(t));
        let b = tensor(dtype, &[rows], &rng.units(rows), skew);
        bias.extend(if with_bias { b.to_f32() } else { vec![0.0; rows] });
        biases.push(b);
    }
    if !with_bias {
        biases.clear();
    }
    Matrix { weight: ops.weight(&tensors, &biases).unwrap(), values, bias, n, k }
}

fn reference(m: &Matrix, x: &[f32], rows: usize) -> Vec<f64> {
    let mut out = vec![];
    for t in 0..rows {
        for n in 0..m.n {
            let dot: f64 =
                (0..m.k).map(|k| f64::from(x[t * m.k + k]) * f64::from(m.values[n * m.k + k])).sum();
            out.push(dot + f64::from(m.bias[n]));
        }
    }
    out
}

fn product(ops: &CpuOps, m: &Matrix, x: &[f32], rows: usize) -> Vec<f32> {
    let mut out = poisoned(ops, rows * m.n);
    ops.linear(&mut out, &buffer(ops, x), &m.weight, rows, Epilogue::Store).unwrap();
    ops.download(&out, rows * m.n).unwrap()
}

#[test]
fn agrees_with_f64_on_awkward_shapes() {
    let shapes: [(&[usize], usize); 10] = [
        (&[1], 2),
        (&[3], 24),
        (&[5, 2], 33),
        (&[16], 31),
        (&[24, 8, 8], 64),
        (&[17], 95),
        (&[40, 9], 160),
        (&[33], 257),
        (&[7], 1),
        // Long enough to be taken in blocks of K.
        (&[11], 1665),
    ];
    for compute in [Compute::F32, Compute::Bf16] {
        for ops in devices(compute, 2) {
            for dtype in DTYPES {
                for (i, (parts, k)) in shapes.iter().enumerate() {
                    let m = matrix(&ops, dtype, parts, *k, i, i % 2 == 0, i as u64);
                    for rows in [1, 2, 3, 7, 19, 70] {
                        let x = Rng::new(7).units(rows * k);
                        let want = reference(&m, &rounded(&x, compute, dtype), rows);
                        let what = format!("{} {compute:?} {dtype:?} {rows} x {parts:?} x {k}", ops.isa());
                        assert_close(&product(&ops, &m, &x, rows), &want, 2e-6 * (*k as f64 + 10.0), &what);
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn agrees_with_f64_on_any_shape(n in 1..70_usize, k in 1..200_usize, rows in 1..40_usize, skew in 0..5_usize, d in 0..3_usize) {
        for compute in [Compute::F32, Compute::Bf16] {
            for ops in devices(compute, 1) {
                let m = matrix(&ops, DTYPES[d], &[n], k, skew, true, (n * k) as u64);
                let x = Rng::new(k as u64).units(rows * k);
                let want = reference(&m, &rounded(&x, compute, DTYPES[d]), rows);
                assert_close(&product(&ops, &m, &x, rows), &want, 2e-6 * (k as f64 + 10.0), ops.isa().name());
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads() {
    for compute in [Compute::F32, Compute::Bf16] {
        for threads in [1, 2] {
            for ops in devices(compute, threads) {
                for (dtype, k) in [
                    (DType::Bf16, 160),
                    (DType::Bf16, 33),
                    (DType::Bf16, 2100),
                    (DType::F16, 96),
                    (DType::F32, 830),
                ] {
                    let m = matrix(&ops, dtype, &[26, 13], k, 3, true, 5);
                    let x = Rng::new(3).units(513 * k);
                    let alone: Vec<f32> =
                        (0..513).flat_map(|t| product(&ops, &m, &x[t * k..(t + 1) * k], 1)).collect();
                    for rows in [1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 64, 513] {
                        for first in [0, 1, 513 - rows] {
                            let first = first.min(513 - rows);
                            let got = product(&ops, &m, &x[first * k..(first + rows) * k], rows);
                            let what =
                                format!("{} {compute:?} {dtype:?} {rows} rows from {first}", ops.isa());
                            assert_same(&got, &alone[first * m.n..(first + rows) * m.n], &what);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn threads_do_not_show() {
    for compute in [Compute::F32, Compute::Bf16] {
        for (one, two) in devices(compute, 1).iter().zip(devices(compute, 2)) {
            let (a, b) = (
                matrix(one, DType::Bf16, &[700, 68], 320, 2, true, 9),
                matrix(&two, DType::Bf16, &[700, 68], 320, 2, true, 9),
            );
            for rows in [1, 8, 40] {
                let x = Rng::new(4).units(rows * 320);
                assert_same(&product(one, &a, &x, rows), &product(&two, &b, &x, rows), one.isa().name());
                let inside = two.enter(|| product(&two, &b, &x, rows));
                assert_same(&product(one, &a, &x, rows), &inside, one.isa().name());
            }
        }
    }
}

#[test]
fn adds_to_the_residual() {
    for ops in devices(Compute::Bf16, 2) {
        let m = matrix(&ops, DType::Bf16, &[20], 48, 0, true, 11);
        let (x, old) = (Rng::new(1).units(3 * 48), Rng::new(2).units(3 * 20));
        let mut out = buffer(&ops, &old);
        ops.linear(&mut out, &buffer(&ops, &x), &m.weight, 3, Epilogue::Add).unwrap();
        let want: Vec<f32> = product(&ops, &m, &x, 3).iter().zip(&old).map(|(p, o)| o + p).collect();
        assert_same(&out.as_slice()[..60], &want, ops.isa().name());
    }
}

#[test]
fn writes_nothing_beyond_its_rows() {
    for ops in devices(Compute::Bf16, 2) {
        let m = matrix(&ops, DType::Bf16, &[9], 40, 1, false, 11);
        let mut out = buffer(&ops, &[7.0; 9 * 4]);
        ops.linear(&mut out, &buffer(&ops, &[1.0; 80]), &m.weight, 2, Epilogue::Store).unwrap();
        assert!(out.as_slice()[18..36].iter().all(|&v| v == 7.0));
    }
}

#[test]
fn refuses_parts_that_do_not_fit() {
    let ops = &devices(Compute::Bf16, 1)[0];
    let b = |shape: &[usize], dtype| tensor(dtype, shape, &vec![0.0; shape.iter().product()], 0);
    let t = |shape: &[usize], dtype| HostMatrix::from(b(shape, dtype));
    let shape = |r: Result<CpuWeight, KernelError>| assert!(matches!(r, Err(KernelError::Shape { .. })));
    shape(ops.weight(&[], &[]));
    shape(ops.weight(&[t(&[4], DType::F32)], &[]));
    shape(ops.weight(&[t(&[4, 2], DType::F32), t(&[4, 3], DType::F32)], &[]));
    shape(ops.weight(&[t(&[4, 2], DType::F32)], &[b(&[3], DType::F32)]));
    shape(ops.weight(&[t(&[4, 2], DType::F32)], &[b(&[4], DType::F32), b(&[4], DType::F32)]));
    let mut alone = t(&[4, 2], DType::Bf16);
    if let HostMatrix::Dense(tensor) = &mut alone {
        (tensor.dtype, tensor.shape) = (DType::F8E4M3, vec![8, 2]);
    }
    assert!(matches!(ops.weight(&[alone], &[]), Err(KernelError::Unsupported { .. })), "no scales");
}
