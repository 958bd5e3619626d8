//! `activation.cu` against f64.

use tidemill_kernels::{
    KernelError,
    cuda::{
        Device,
        ops::{Activation, ActivationKind, activation},
    },
};

use crate::{
    common::{Rng, assert_same},
    harness::{assert_near, bf16s, on_every_schedule, poisoned, rounded, values},
    words::device,
};

const KINDS: [ActivationKind; 4] =
    [ActivationKind::Silu, ActivationKind::Gelu, ActivationKind::GeluTanh, ActivationKind::Relu];
/// Gated alone; its limit is within what the tests feed it.
pub const OAI: ActivationKind = ActivationKind::SwigluOai { alpha: 1.702, limit: 1.5 };

/// Maclaurin's series: 1e-9 for arguments below 4.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..100 {
        let n = f64::from(n);
        term *= -x * x / n;
        sum += term / (2.0 * n + 1.0);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

pub fn exact(kind: ActivationKind, x: f64) -> f64 {
    match kind {
        ActivationKind::Silu => x / (1.0 + (-x).exp()),
        ActivationKind::Gelu => 0.5 * x * (1.0 + erf(x / 2_f64.sqrt())),
        ActivationKind::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        ActivationKind::Relu => x.max(0.0),
        ActivationKind::SwigluOai { alpha, limit } => {
            let g = x.min(f64::from(limit));
            g / (1.0 + (-f64::from(alpha) * g).exp())
        }
    }
}

/// What the function of a gate is multiplied with.
pub fn exact_up(kind: ActivationKind, up: f64) -> f64 {
    match kind {
        ActivationKind::SwigluOai { limit, .. } => up.clamp(-f64::from(limit), f64::from(limit)) + 1.0,
        _ => up,
    }
}

fn run(device: &Device, x: &[f32], kind: ActivationKind, gated: bool, width: usize) -> Vec<f32> {
    let rows = x.len() / width / if gated { 2 } else { 1 };
    let mut out = poisoned(device, rows * width);
    let x = bf16s(device, x);
    activation(device, Activation { out: &mut out, x: &x, kind, gated, width, rows }).unwrap();
    values(device, &out)
}

#[test]
fn agrees_with_f64_gated_and_plain_and_rows_stand_alone() {
    on_every_schedule(|device| {
        for (rows, width) in [(1, 8), (3, 200), (2, 2064)] {
            for kind in KINDS.into_iter().chain([OAI]) {
                let x: Vec<f32> =
                    Rng::new(width as u64).units(2 * rows * width).iter().map(|v| v * 5.0).collect();
                let x = rounded(&x);
                let gated = run(device, &x, kind, true, width);
                let want: Vec<f64> = x
                    .chunks(2 * width)
                    .flat_map(|row| {
                        let (gate, up) = row.split_at(width);
                        gate.iter()
                            .zip(up)
                            .map(move |(&g, &u)| exact(kind, f64::from(g)) * exact_up(kind, f64::from(u)))
                    })
                    .collect();
                // Half a unit of bf16 is 0.2 %; 1 + erf and 1 + tanh cancel for negative arguments.
                assert_near(&gated, &want, 0.004, 2e-5, "gated");
                let alone = run(device, &x[..2 * width], kind, true, width);
                assert_same(&alone, &gated[..width], "first row alone");
                if kind == OAI {
                    continue;
                }
                let plain = run(device, &x, kind, false, width);
                let want: Vec<f64> = x.iter().map(|&v| exact(kind, f64::from(v))).collect();
                assert_near(&plain, &want, 0.004, 5e-6, "plain");
            }
        }
    });
}

#[test]
fn far_arguments_saturate() {
    let (device, _) = device();
    for kind in KINDS {
        let x = [-3e38, -200.0, -89.0, 0.0, 89.0, 200.0, 1e30, 3e38];
        let out = run(&device, &x, kind, false, 8);
        assert_eq!(out[..4], [0.0; 4], "{kind:?}");
        assert_same(&out[4..], &rounded(&x[4..]), "identity");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (device, _) = device();
    let call_of = |kind: ActivationKind, width: usize, gated: bool| {
        let (mut out, x) = (poisoned(&device, 16), poisoned(&device, 16));
        activation(&device, Activation { out: &mut out, x: &x, kind, gated, width, rows: 1 })
    };
    let call = |width: usize, gated: bool| call_of(ActivationKind::Silu, width, gated);
    assert!(call(16, false).is_ok());
    assert!(call_of(OAI, 8, true).is_ok());
    assert!(matches!(call_of(OAI, 8, false), Err(KernelError::Unsupported { op: "activation", .. })));
    assert!(matches!(call(12, false), Err(KernelError::Unsupported { op: "activation", .. })));
    assert!(matches!(call(24, false), Err(KernelError::Shape { op: "activation", .. })));
    assert!(matches!(call(16, true), Err(KernelError::Shape { op: "activation", .. })));
}
