//! `embedding`, norms, additions, `gather_rows`.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{Rng, assert_close, assert_same, buffer, devices, poisoned, tensor};
use tidemill_kernels::{
    DType, Ops,
    cpu::Compute,
    ops::{BatchMeta, Lookup, Norm},
};

const WIDTHS: [usize; 7] = [1, 2, 15, 64, 100, 768, 1031];

#[test]
fn rmsnorm_agrees_with_f64_and_rows_stand_alone() {
    for threads in [1, 2] {
        for ops in devices(Compute::F32, threads) {
            for h in WIDTHS {
                let mut rng = Rng::new(h as u64);
                let (x, w) = (rng.units(65 * h), rng.units(h));
                let weight = ops.vector(&w).unwrap();
                let norm = |x: &[f32]| {
                    let mut out = poisoned(&ops, x.len());
                    ops.norm(
                        &mut out,
                        &buffer(&ops, x),
                        Norm::Rms { weight: &weight, eps: 1e-5 },
                        x.len() / h,
                    )
                    .unwrap();
                    ops.download(&out, x.len()).unwrap()
                };
                let all = norm(&x);
                for (r, x) in x.chunks(h).enumerate() {
                    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / h as f64;
                    let want: Vec<f64> = x
                        .iter()
                        .zip(&w)
                        .map(|(&v, &w)| f64::from(v) / (mean + 1e-5).sqrt() * f64::from(w))
                        .collect();
                    assert_close(&all[r * h..(r + 1) * h], &want, 2e-6 * (h as f64).sqrt(), ops.isa().name());
                    assert_same(&norm(x), &all[r * h..(r + 1) * h], ops.isa().name());
                }
            }
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
