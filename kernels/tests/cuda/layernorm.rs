//! `layernorm.cu` against f64.

use tidemill_kernels::{
    KernelError,
    cuda::{
        Device,
        ops::{LayerNorm, layernorm},
    },
};

use crate::{
    common::{Rng, assert_same},
    harness::{assert_near, bf16s, f32s, on_every_schedule, poisoned, rounded, values},
    words::device,
};

const EPS: f32 = 1e-5;

struct Case {
    x: Vec<f32>,
    residual: Option<Vec<f32>>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

fn run(device: &Device, case: &Case) -> (Vec<f32>, Vec<f32>) {
    let width = case.weight.len();
    let mut out = poisoned(device, case.x.len());
    let mut residual = case.residual.as_ref().map(|r| bf16s(device, r));
    let bias = case.bias.as_ref().map(|b| f32s(device, b));
    let call = LayerNorm {
        out: &mut out,
        x: &bf16s(device, &case.x),
        residual: residual.as_mut(),
        weight: &f32s(device, &case.weight),
        bias: bias.as_ref(),
        width,
        eps: EPS,
        rows: case.x.len() / width,
    };
    layernorm(device, call).unwrap();
    (values(device, &out), residual.map(|r| values(device, &r)).unwrap_or_default())
}

fn expected(x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
    let n = weight.len() as f64;
    x.chunks(weight.len())
        .flat_map(|row| {
            let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
            let scale = 1.0 / (variance + f64::from(EPS)).sqrt();
            row.iter().enumerate().map(move |(i, &v)| {
                (f64::from(v) - mean) * scale * f64::from(weight[i]) + bias.map_or(0.0, |b| f64::from(b[i]))
            })
        })
        .collect()
}

#[test]
fn agrees_with_f64_far_from_zero_too_and_rows_stand_alone() {
    on_every_schedule(|device| {
        for (rows, width, shift) in [(1, 8, 0.0), (5, 64, 3.0), (2, 2056, 50.0), (3, 4096, 0.0)] {
            let mut rng = Rng::new(width as u64);
            let n = rows * width;
            let x = rounded(&rng.units(n).iter().map(|v| v + shift).collect::<Vec<_>>());
            let mut case = Case { x, residual: None, weight: rng.units(width), bias: None };
            let (out, _) = run(device, &case);
            assert_near(&out, &expected(&case.x, &case.weight, None), 0.005, 2e-5, "plain");
            let first = Case { x: case.x[..width].to_vec(), weight: case.weight.clone(), ..case };
            assert_same(&run(device, &first).0, &out[..width], "first row alone");

            case = Case { x: rounded(&rng.units(n)), ..first };
            case.residual = Some(rounded(&rng.units(n)));
            case.bias = Some(rng.units(width));
            let (out, residual) = run(device, &case);
            let sum: Vec<f32> =
                case.x.iter().zip(case.residual.iter().flatten()).map(|(x, r)| x + r).collect();
            assert_same(&residual, &rounded(&sum), "residual");
            let want = expected(&residual, &case.weight, case.bias.as_deref());
            assert_near(&out, &want, 0.005, 2e-5, "after the residual");
        }
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let (device, _) = device();
    let call = |width: usize, bias: usize| {
        let (mut out, x) = (poisoned(&device, 16), poisoned(&device, 16));
        let (weight, bias) = (f32s(&device, &[1.0; 16]), f32s(&device, &vec![0.0; bias]));
        let call = LayerNorm {
            out: &mut out,
            x: &x,
            residual: None,
            weight: &weight,
            bias: Some(&bias),
            width,
            eps: EPS,
            rows: 1,
        };
        layernorm(&device, call)
    };
    assert!(call(16, 16).is_ok());
    assert!(matches!(call(12, 16), Err(KernelError::Unsupported { op: "layernorm", .. })));
    assert!(matches!(call(24, 24), Err(KernelError::Shape { op: "layernorm", .. })));
    assert!(matches!(call(16, 8), Err(KernelError::Shape { op: "layernorm", .. })));
}
