//! `embedding`, norms, additions, `gather_rows`.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{Rng, assert_close, assert_same, buffer, devices, poisoned, tensor};
use tidemill_kernels::{
    DType, Ops,
    cpu::Compute,
    ops::{BatchMeta, Lookup, Norm, Slices},
};

const WIDTHS: [usize; 7] = [1, 2, 15, 64, 100, 768, 1031];

/// A norm with its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Rms,
    Layer,
    LayerWithBias,
}

const KINDS: [Kind; 3] = [Kind::Rms, Kind::Layer, Kind::LayerWithBias];
const EPS: f32 = 1e-5;

impl Kind {
    fn norm<'a>(self, weight: &'a Vec<f32>, bias: &'a Vec<f32>) -> Norm<'a, Vec<f32>> {
        match self {
            Kind::Rms => Norm::Rms { weight, eps: EPS },
            Kind::Layer => Norm::Layer { weight, bias: None, eps: EPS },
            Kind::LayerWithBias => Norm::Layer { weight, bias: Some(bias), eps: EPS },
        }
    }

    fn reference(self, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = if self == Kind::Rms { 0.0 } else { x.iter().map(|&v| f64::from(v)).sum::<f64>() / n };
        let square = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        let of = |((v, w), b): ((&f32, &f32), &f32)| {
            let bias = if self == Kind::LayerWithBias { f64::from(*b) } else { 0.0 };
            (f64::from(*v) - mean) / (square + f64::from(EPS)).sqrt() * f64::from(*w) + bias
        };
        x.iter().zip(weight).zip(bias).map(of).collect()
    }
}

#[test]
fn norms_agree_with_f64_and_rows_stand_alone() {
    for threads in [1, 2] {
        for ops in devices(Compute::F32, threads) {
            for h in WIDTHS {
                let mut rng = Rng::new(h as u64);
                let (x, old) = (rng.units(65 * h), rng.units(65 * h));
                let (weight, bias) = (rng.units(h), rng.units(h));
                for kind in KINDS {
                    let norm = kind.norm(&weight, &bias);
                    let run = |x: &[f32]| {
                        let mut out = poisoned(&ops, x.len());
                        ops.norm(&mut out, &buffer(&ops, x), norm, x.len() / h).unwrap();
                        ops.download(&out, x.len()).unwrap()
                    };
                    let all = run(&x);
                    for (x, row) in x.chunks(h).zip(all.chunks(h)) {
                        let what = format!("{} {kind:?} {h}", ops.isa());
                        let want = kind.reference(x, &weight, &bias);
                        assert_close(row, &want, 2e-6 * (h as f64).sqrt(), &what);
                        assert_same(&run(x), row, &what);
                    }
                    let mut out = buffer(&ops, &old);
                    ops.norm_add(&mut out, &buffer(&ops, &x), norm, 65).unwrap();
                    let want: Vec<f32> = all.iter().zip(&old).map(|(y, old)| old + y).collect();
                    assert_same(&ops.download(&out, 65 * h).unwrap(), &want, "on top of what was there");
                }
            }
        }
    }
}

/// The residual stream of some models is far from zero in places.
#[test]
fn layer_norm_keeps_the_digits_of_rows_far_from_zero() {
    for ops in devices(Compute::F32, 1) {
        for (h, far) in [(100, 1e3), (1031, 1e4), (4096, -3e3)] {
            // Multiples of 2^-10, so that the rows hold what they are to.
            let x: Vec<f32> =
                Rng::new(h as u64).units(h).iter().map(|v| (v * 1024.0).round() / 1024.0 + far).collect();
            let (ones, zeros) = (vec![1.0; h], vec![0.0; h]);
            let mut out = poisoned(&ops, h);
            ops.norm(&mut out, &buffer(&ops, &x), Kind::Layer.norm(&ones, &zeros), 1).unwrap();
            assert_close(out.as_slice(), &Kind::Layer.reference(&x, &ones, &zeros), 1e-5, ops.isa().name());
        }
    }
}

#[test]
fn norms_of_parts_leave_the_rest() {
    for threads in [1, 2] {
        for ops in devices(Compute::F32, threads) {
            for (rows, stride, offset, groups, width) in [
                (1, 6, 0, 1, 6),
                (9, 100, 7, 3, 20),
                (65, 64, 32, 2, 16),
                (40, 700, 60, 5, 128),
                (5, 9, 4, 5, 1),
            ] {
                let slices = Slices { rows, stride, offset, groups, width };
                let mut rng = Rng::new(stride as u64);
                let (weight, bias) = (rng.units(groups * width), rng.units(groups * width));
                // The last row ends with its last part.
                let x = rng.units((rows - 1) * stride + offset + groups * width);
                for kind in KINDS {
                    let mut out = buffer(&ops, &x);
                    ops.norm_slices(&mut out, kind.norm(&weight, &bias), slices).unwrap();
                    let mut want: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
                    for r in 0..rows {
                        for g in 0..groups {
                            let (at, of) = (r * stride + offset + g * width, g * width..(g + 1) * width);
                            let part = kind.reference(&x[at..at + width], &weight[of.clone()], &bias[of]);
                            want[at..at + width].copy_from_slice(&part);
                        }
                    }
                    let got = ops.download(&out, x.len()).unwrap();
                    assert_close(&got, &want, 2e-5, &format!("{} {kind:?} {slices:?}", ops.isa()));
                    for i in
                        (0..x.len()).filter(|i| !(offset..offset + groups * width).contains(&(i % stride)))
                    {
                        assert_eq!(got[i].to_bits(), x[i].to_bits(), "between the parts");
                    }
                }
            }
        }
    }
}

#[test]
fn additions() {
    for threads in [1, 2] {
        for ops in devices(Compute::F32, threads) {
            for (rows, width) in [(1, 1), (3, 17), (65, 1031)] {
                let mut rng = Rng::new(width as u64);
                let elems = rows * width;
                let (old, x) = (rng.units(elems + 5), rng.units(elems + 5));
                let mut out = buffer(&ops, &old);
                ops.add(&mut out, &buffer(&ops, &x), elems).unwrap();
                let mut want: Vec<f32> = old.iter().zip(&x).map(|(a, b)| a + b).collect();
                want[elems..].copy_from_slice(&old[elems..]);
                assert_same(&ops.download(&out, elems + 5).unwrap(), &want, "sum, and nothing beyond");

                let gate: Vec<f32> = rng.units(rows).iter().map(|v| v * 20.0).collect();
                let mut logits = ops.logits_buffer(rows).unwrap();
                logits.as_mut_slice()[..rows].copy_from_slice(&gate);
                let mut out = buffer(&ops, &old);
                ops.add_gated(&mut out, &buffer(&ops, &x), &logits, rows, width).unwrap();
                let want: Vec<f64> = (0..elems)
                    .map(|i| {
                        f64::from(old[i]) + f64::from(x[i]) / (1.0 + (-f64::from(gate[i / width])).exp())
                    })
                    .collect();
                assert_close(&ops.download(&out, elems).unwrap(), &want, 3e-7, "gated");
                assert_same(&out.as_slice()[elems..elems + 5], &old[elems..], "nothing beyond");
            }
        }
    }
}

#[test]
fn look_ups_by_position_and_segment_add_and_tokens_are_scaled() {
    for ops in devices(Compute::Bf16, 2) {
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            let h = 9;
            let table = tensor(dtype, &[7, h], &Rng::new(1).units(7 * h), 1);
            let rows = table.to_f32();
            let table = ops.table(&table.into()).unwrap();
            let meta = BatchMeta {
                token_ids: vec![6, 0, 3],
                positions: vec![4, 0, 2],
                segments: vec![1, 0, 1],
                ..BatchMeta::default()
            };
            let old = Rng::new(2).units(3 * h);
            let check = |meta: &BatchMeta, lookup, from: [usize; 3], of: &dyn Fn(f32, f32) -> f32| {
                let batch = ops.upload(Arc::new(meta.clone()), Arc::default()).unwrap();
                let mut out = buffer(&ops, &old);
                ops.embedding(&mut out, &table, &batch, lookup).unwrap();
                let row = |i: usize| rows[from[i / h] * h + i % h];
                let want: Vec<f32> = (0..3 * h).map(|i| of(old[i], row(i))).collect();
                assert_same(&ops.download(&out, 3 * h).unwrap(), &want, &format!("{lookup:?}"));
            };
            check(&meta, Lookup::Tokens { scale: 5.5 }, [6, 0, 3], &|_, x| x * 5.5);
            check(&meta, Lookup::Positions { offset: 2 }, [6, 2, 4], &|old, x| old + x);
            check(&meta, Lookup::Positions { offset: 0 }, [4, 0, 2], &|old, x| old + x);
            check(&meta, Lookup::Segments, [1, 0, 1], &|old, x| old + x);
            let none = BatchMeta { segments: vec![], ..meta };
            check(&none, Lookup::Segments, [0; 3], &|old, x| old + x);
        }
    }
}

#[test]
fn embedding_and_gather_copy_rows() {
    for ops in devices(Compute::Bf16, 2) {
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            let (a, b) = (
                tensor(dtype, &[5, 9], &Rng::new(1).units(45), 1),
                tensor(dtype, &[4, 9], &Rng::new(2).units(36), 3),
            );
            let rows: Vec<f32> = [a.to_f32(), b.to_f32()].concat();
            let table = ops.weight(&[a.into(), b.into()], &[]).unwrap();
            let meta = BatchMeta {
                token_ids: vec![8, 0, 4, 5, 8],
                logits_indices: vec![4, 1],
                ..BatchMeta::default()
            };
            let batch = ops.upload(Arc::new(meta.clone()), Arc::default()).unwrap();
            let mut out = poisoned(&ops, 45);
            ops.embedding(&mut out, &table, &batch, Lookup::Tokens { scale: 1.0 }).unwrap();
            for (t, &id) in meta.token_ids.iter().enumerate() {
                assert_same(&out.as_slice()[t * 9..(t + 1) * 9], &rows[id as usize * 9..][..9], "embedding");
            }
            let mut last = poisoned(&ops, 18);
            ops.gather_rows(&mut last, &out, &batch, 0..2, 9).unwrap();
            assert_same(&last.as_slice()[..9], &rows[72..81], "gather");
            assert_same(&last.as_slice()[9..18], &rows[..9], "gather");
            ops.gather_rows(&mut last, &out, &batch, 1..2, 9).unwrap();
            assert_same(&last.as_slice()[..9], &rows[..9], "gather the second row alone");
        }
    }
}
