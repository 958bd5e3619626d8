//! `Ops::linear_gated` and the epilogues of `Ops::linear`: functions against f64.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Rng, assert_same, buffer, devices, poisoned, tensor};
use tidemill_kernels::{
    DType, KernelError, Ops,
    cpu::{Compute, CpuOps, CpuWeight},
    ops::{Activation, Epilogue},
};

const OAI: Activation = Activation::SwigluOai { alpha: 1.702, limit: 7.0 };
const UNARY: [Activation; 4] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

/// The error function, by a series without cancellation (Abramowitz and Stegun 1964, 7.1.6).
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..300 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    sum * (-x * x).exp() * 2.0 / std::f64::consts::PI.sqrt()
}

fn unary(f: Activation, x: f64) -> f64 {
    match f {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x * 0.5 * (1.0 + erf(x / 2_f64.sqrt())),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::SwigluOai { .. } => unreachable!(),
    }
}

fn gated(f: Activation, gate: f64, up: f64) -> f64 {
    match f {
        Activation::SwigluOai { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let g = gate.min(limit);
            (up.clamp(-limit, limit) + 1.0) * g / (1.0 + (-alpha * g).exp())
        }
        _ => unary(f, gate) * up,
    }
}

/// A matrix of one column, so that a product is its input.
fn column(ops: &CpuOps, values: &[f32]) -> CpuWeight {
    ops.weight(&[tensor(DType::F32, &[values.len(), 1], values, 0).into()], &[]).unwrap()
}

/// The gated function of `values`, gates first, in one row for each of `factors`.
fn gate(ops: &CpuOps, f: Activation, values: &[f32], factors: &[f32]) -> Vec<f32> {
    let elems = factors.len() * values.len();
    let (mut out, mut scratch) = (poisoned(ops, elems / 2), ops.scratch_buffer(elems).unwrap());
    let (x, weight) = (buffer(ops, factors), column(ops, values));
    ops.linear_gated(&mut out, &mut scratch, &x, &weight, factors.len(), f).unwrap();
    ops.download(&out, elems / 2).unwrap()
}

#[track_caller]
fn assert_near(got: f32, want: f64, what: &str) {
    assert!((f64::from(got) - want).abs() <= 6e-7 * want.abs().max(1.0), "{what}: {got}, expected {want}");
}

#[test]
fn gates_agree_with_f64_and_rows_stand_alone() {
    // Powers of two, so that the products are exact.
    let factors: Vec<f32> = (0..65).map(|i| [1.0, -0.5, 2.0, 0.125, -4.0][i % 5]).collect();
    for threads in [1, 2] {
        for ops in devices(Compute::F32, threads) {
            for width in [1, 2, 15, 64, 100, 768, 1031] {
                let values: Vec<f32> =
                    Rng::new(width as u64).units(2 * width).iter().map(|v| v * 6.0).collect();
                for f in UNARY.into_iter().chain([OAI]) {
                    let all = gate(&ops, f, &values, &factors);
                    for (row, &factor) in all.chunks(width).zip(&factors) {
                        for i in 0..width {
                            let [g, u] = [values[i], values[width + i]].map(|v| f64::from(v * factor));
                            assert_near(row[i], gated(f, g, u), &format!("{} {f:?}({g}, {u})", ops.isa()));
                        }
                        assert_same(&gate(&ops, f, &values, &[factor]), row, ops.isa().name());
                    }
                }
            }
        }
    }
}

#[test]
fn gates_keep_their_heads_at_the_ends_of_the_range() {
    for ops in devices(Compute::F32, 1) {
        let gates = [-1e4, -100.0, -88.0, -9.0, -1e-30, 0.0, 1e-30, 88.0, 100.0, 1e4, f32::NAN];
        let values = [gates, [1.0; 11]].concat();
        for f in UNARY.into_iter().chain([OAI]) {
            let out = gate(&ops, f, &values, &[1.0]);
            assert!(out[10].is_nan(), "{f:?} hides what is no number");
            for (g, y) in gates.iter().zip(&out).take(10) {
                let want = gated(f, f64::from(*g), 1.0);
                let what = format!("{} {f:?}({g}) = {y}, {want}", ops.isa());
                assert!(
                    (f64::from(*y) - want).abs()
                        <= 1e-6 * want.abs() + 1e-7 * f64::from(g.min(0.0).abs().min(10.0)) + 1e-35,
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn gelu_is_the_exact_one() {
    let xs: Vec<f32> = (0..80_000).map(|i| (i as f32 - 40_000.0) / 4_000.0).collect();
    for ops in devices(Compute::F32, 1) {
        let values = [xs.clone(), vec![1.0; xs.len()]].concat();
        for (x, y) in xs.iter().zip(gate(&ops, Activation::Gelu, &values, &[1.0])) {
            let want = unary(Activation::Gelu, f64::from(*x));
            assert!((f64::from(y) - want).abs() < 1e-6, "{}: {x}: {y}, {want}", ops.isa());
        }
    }
}

#[test]
fn epilogues_agree_with_f64_and_rows_stand_alone() {
    for threads in [1, 2] {
        for ops in devices(Compute::F32, threads) {
            for (n, k) in [(1, 1), (9, 3), (70, 33), (700, 24)] {
                let mut rng = Rng::new(n as u64);
                let (w, b, x) = (rng.units(n * k), rng.units(n), rng.units(17 * k));
                let part = tensor(DType::F32, &[n, k], &w, 1).into();
                let weight = ops.weight(&[part], &[tensor(DType::F32, &[n], &b, 0)]).unwrap();
                let run = |x: &[f32], epilogue| {
                    let rows = x.len() / k;
                    let mut out = poisoned(&ops, rows * n);
                    ops.linear(&mut out, &buffer(&ops, x), &weight, rows, epilogue).unwrap();
                    ops.download(&out, rows * n).unwrap()
                };
                let product = run(&x, Epilogue::Store);
                let check = |epilogue, want: &dyn Fn(f64) -> f64| {
                    let all = run(&x, epilogue);
                    for (y, v) in all.iter().zip(&product) {
                        assert_near(*y, want(f64::from(*v)), &format!("{} {epilogue:?}({v})", ops.isa()));
                    }
                    for (x, all) in x.chunks(k).zip(all.chunks(n)) {
                        assert_same(&run(x, epilogue), all, ops.isa().name());
                    }
                };
                for f in UNARY {
                    check(Epilogue::Activate(f), &|v| unary(f, v));
                }
                check(Epilogue::SoftCap(1.5), &|v| 1.5 * (v / 1.5).tanh());
            }
        }
    }
}

#[test]
fn a_function_of_two_numbers_is_no_epilogue() {
    let ops = &devices(Compute::F32, 1)[0];
    let mut out = poisoned(ops, 1);
    let done = ops.linear(&mut out, &buffer(ops, &[1.0]), &column(ops, &[1.0]), 1, Epilogue::Activate(OAI));
    assert!(matches!(done, Err(KernelError::Unsupported { .. })));
}
