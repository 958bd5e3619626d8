//! `rmsnorm.cu` against f64.

use tidemill_kernels::{
    KernelError,
    cuda::{
        Device,
        ops::{RmsNorm, rmsnorm},
    },
};

use crate::{
    common::{Rng, assert_same},
    harness::{assert_near, bf16s, f32s, on_every_schedule, poisoned, rounded, values},
};

const EPS: f32 = 1e-5;

fn run(device: &Device, x: &[f32], residual: Option<&[f32]>, weight: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (width, rows) = (weight.len(), x.len() / weight.len());
    let mut out = poisoned(device, x.len());
    let mut residual = residual.map(|r| bf16s(device, r));
    let (x, weight) = (bf16s(device, x), f32s(device, weight));
    let call =
        RmsNorm { out: &mut out, x: &x, residual: residual.as_mut(), weight: &weight, width, eps: EPS, rows };
    rmsnorm(device, call).unwrap();
    let residual = residual.map(|r| values(device, &r)).unwrap_or_default();
    (values(device, &out), residual)
}

fn expected(x: &[f32], weight: &[f32]) -> Vec<f64> {
    x.chunks(weight.len())
        .flat_map(|row| {
            let mean = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
            row.iter().zip(weight).map(move |(&v, &w)| f64::from(v) * scale * f64::from(w))
        })
        .collect()
}

/// A run for the tests of planted faults.
pub fn sample(device: &Device) -> Vec<f32> {
    let mut rng = Rng::new(7);
    let (x, residual, weight) = (rng.units(2 * 512), rng.units(2 * 512), rng.units(512));
    run(device, &x, Some(&residual), &weight).0
}

#[test]
fn agrees_with_f64_with_and_without_residual_and_rows_stand_alone() {
    on_every_schedule(|device| {
        for (rows, width) in [(1, 8), (5, 64), (3, 2048), (2, 2056), (7, 4096)] {
            let mut rng = Rng::new(width as u64);
            let (x, r) = (rounded(&rng.units(rows * width)), rounded(&rng.units(rows * width)));
            let weight = rng.units(width);
            let (out, _) = run(device, &x, None, &weight);
            assert_near(&out, &expected(&x, &weight), 0.005, 1e-6, "plain");
            let (one, _) = run(device, &x[..width], None, &weight);
            assert_same(&one, &out[..width], "first row alone");

            let sum: Vec<f32> = x.iter().zip(&r).map(|(x, r)| x + r).collect();
            let (out, residual) = run(device, &x, Some(&r), &weight);
            assert_same(&residual, &rounded(&sum), "residual");
            assert_near(&out, &expected(&residual, &weight), 0.005, 1e-6, "after the residual");
        }
    });
}

#[test]
fn a_width_that_the_vector_loads_cannot_take_is_refused() {
    let device = Device::new(std::sync::Arc::new(tidemill_kernels_emu::EmuDriver::new(Default::default())));
    let (x, weight) = (bf16s(&device, &[0.0; 12]), f32s(&device, &[0.0; 12]));
    let mut out = poisoned(&device, 12);
    let call =
        RmsNorm { out: &mut out, x: &x, residual: None, weight: &weight, width: 12, eps: EPS, rows: 1 };
    assert!(matches!(rmsnorm(&device, call), Err(KernelError::Unsupported { op: "rmsnorm", .. })));
    let call =
        RmsNorm { out: &mut out, x: &x, residual: None, weight: &weight, width: 16, eps: EPS, rows: 1 };
    assert!(matches!(rmsnorm(&device, call), Err(KernelError::Shape { op: "rmsnorm", .. })));
}
