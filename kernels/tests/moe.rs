//! Mixtures of experts: the choice, and the products of the chosen ones, against f64 and bit by bit.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Rng, assert_close, assert_same, buffer, devices, poisoned, tensor};
use tidemill_kernels::{
    DType, HostTensor, KernelError, Ops,
    cpu::{Compute, CpuOps},
    ops::{Activation, ExpertGroups, ExpertScoring, Routing},
    tensor::ExpertParts,
};

const HIDDEN: usize = 40;
const INTER: usize = 24;

/// The experts of a layer: gate and up, and down, each with a bias.
struct Layer {
    gate_up: Vec<[HostTensor; 2]>,
    down: Vec<[HostTensor; 2]>,
}

fn layer(experts: usize, dtype: DType) -> Layer {
    let mut rng = Rng::new(experts as u64);
    let mut make = |n: usize, k: usize| -> Vec<[HostTensor; 2]> {
        (0..experts)
            .map(|i| {
                let matrix = tensor(dtype, &[n, k], &rng.units(n * k), i % 4);
                [matrix, tensor(DType::F32, &[n], &rng.units(n), 0)]
            })
            .collect()
    };
    Layer { gate_up: make(2 * INTER, HIDDEN), down: make(HIDDEN, INTER) }
}

fn parts(tensors: &[[HostTensor; 2]]) -> Vec<ExpertParts> {
    let part =
        |[m, b]: &[HostTensor; 2]| ExpertParts { parts: vec![m.clone().into()], bias: vec![b.clone()] };
    tensors.iter().map(part).collect()
}

fn routing(experts: usize, top_k: usize) -> Routing {
    Routing { experts, top_k, scoring: ExpertScoring::Softmax, groups: None, renormalize: false, scale: 1.0 }
}

/// All tokens through the layer on top of a residual stream.
fn run(
    ops: &CpuOps,
    layer: &Layer,
    routing: &Routing,
    bias: Option<&Vec<f32>>,
    data: [&[f32]; 3],
) -> Vec<f32> {
    let [x, logits, residual] = data;
    let (rows, k) = (x.len() / HIDDEN, routing.top_k);
    let (gate_up, down) =
        (ops.experts(&parts(&layer.gate_up)).unwrap(), ops.experts(&parts(&layer.down)).unwrap());
    // More room than is used.
    let mut routes = ops.routes(rows + 3, routing).unwrap();
    ops.moe_route(&mut routes, &buffer(ops, logits), bias, routing, rows).unwrap();
    let mut act = poisoned(ops, rows * k * INTER);
    let mut scratch = ops.scratch_buffer(rows * k * 2 * INTER).unwrap();
    scratch.as_mut_slice().fill(f32::NAN);
    ops.moe_gated(&mut act, &mut scratch, &buffer(ops, x), &gate_up, &routes, rows, Activation::Silu)
        .unwrap();
    let (mut out, mut scratch) = (buffer(ops, residual), poisoned(ops, rows * k * HIDDEN));
    ops.moe_combine(&mut out, &mut scratch, &act, &down, &routes, rows).unwrap();
    ops.download(&out, rows * HIDDEN).unwrap()
}

/// The experts of a token with their weights, by the definition.
fn choice(routing: &Routing, logits: &[f32], bias: Option<&Vec<f32>>) -> Vec<(usize, f64)> {
    let wide: Vec<f64> = logits.iter().map(|&v| f64::from(v)).collect();
    let total: f64 = wide.iter().map(|v| v.exp()).sum();
    let scores: Vec<f64> = wide
        .iter()
        .map(|v| match routing.scoring {
            ExpertScoring::Softmax => v.exp() / total,
            ExpertScoring::Sigmoid => 1.0 / (1.0 + (-v).exp()),
        })
        .collect();
    let mut keys: Vec<f64> =
        scores.iter().enumerate().map(|(i, s)| s + bias.map_or(0.0, |b| f64::from(b[i]))).collect();
    if let Some(ExpertGroups { count, top, by_top_two }) = routing.groups {
        let size = routing.experts / count;
        let group = |g: usize| {
            let mut keys = keys[g * size..(g + 1) * size].to_vec();
            keys.sort_by(|a, b| b.total_cmp(a));
            keys[0] + if by_top_two { keys[1] } else { 0.0 }
        };
        let mut groups: Vec<usize> = (0..count).collect();
        groups.sort_by(|a, b| group(*b).total_cmp(&group(*a)));
        for g in groups.split_off(top) {
            keys[g * size..(g + 1) * size].fill(f64::NEG_INFINITY);
        }
    }
    // A stable sort: the lowest of equals comes first.
    let mut order: Vec<usize> = (0..routing.experts).collect();
    order.sort_by(|a, b| keys[*b].total_cmp(&keys[*a]));
    order.truncate(routing.top_k);
    let sum: f64 = if routing.renormalize { order.iter().map(|&e| scores[e]).sum() } else { 1.0 };
    order.into_iter().map(|e| (e, scores[e] / sum * f64::from(routing.scale))).collect()
}

fn product([matrix, bias]: &[HostTensor; 2], x: &[f64]) -> Vec<f64> {
    let (w, b) = (matrix.to_f32(), bias.to_f32());
    let row =
        |(w, b): (&[f32], &f32)| w.iter().zip(x).map(|(a, b)| f64::from(*a) * b).sum::<f64>() + f64::from(*b);
    w.chunks(x.len()).zip(&b).map(row).collect()
}

fn reference(layer: &Layer, chosen: &[(usize, f64)], x: &[f32], residual: &[f32]) -> Vec<f64> {
    let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
    let mut out = wide(residual);
    for &(expert, weight) in chosen {
        let y = product(&layer.gate_up[expert], &wide(x));
        let act: Vec<f64> = (0..INTER).map(|i| y[i] / (1.0 + (-y[i]).exp()) * y[INTER + i]).collect();
        for (out, y) in out.iter_mut().zip(product(&layer.down[expert], &act)) {
            *out += weight * y;
        }
    }
    out
}

/// The ways to route of the families that there are.
fn routings() -> Vec<(Routing, bool)> {
    let groups = |count, top, by_top_two| Some(ExpertGroups { count, top, by_top_two });
    let sigmoid = ExpertScoring::Sigmoid;
    vec![
        (routing(1, 1), false),
        // Mixtral and GPT-OSS.
        (Routing { renormalize: true, ..routing(8, 2) }, false),
        (Routing { renormalize: true, ..routing(32, 4) }, false),
        // Qwen2-MoE.
        (routing(60, 4), false),
        // DeepSeek-V2.
        (Routing { groups: groups(8, 3, false), scale: 16.0, ..routing(160, 6) }, false),
        // DeepSeek-V3.
        (
            Routing {
                scoring: sigmoid,
                groups: groups(8, 4, true),
                renormalize: true,
                scale: 2.5,
                ..routing(64, 8)
            },
            true,
        ),
        // As many experts as may be chosen from, and groups of one.
        (Routing { groups: groups(4, 2, true), ..routing(8, 4) }, true),
        (Routing { groups: groups(6, 3, false), scoring: sigmoid, ..routing(6, 3) }, false),
    ]
}

#[test]
fn layers_agree_with_f64_and_tokens_stand_alone() {
    for (routing, with_bias) in routings() {
        for dtype in [DType::F32, DType::Bf16] {
            let layer = layer(routing.experts, dtype);
            let mut rng = Rng::new(routing.experts as u64 + 1);
            let (x, residual) = (rng.units(23 * HIDDEN), rng.units(23 * HIDDEN));
            let logits: Vec<f32> = rng.units(23 * routing.experts).iter().map(|v| v * 3.0).collect();
            let bias = with_bias.then(|| rng.units(routing.experts));
            for threads in [1, 2] {
                for ops in devices(Compute::F32, threads) {
                    let all = run(&ops, &layer, &routing, bias.as_ref(), [&x, &logits, &residual]);
                    for r in 0..23 {
                        let data = [
                            &x[r * HIDDEN..(r + 1) * HIDDEN],
                            &logits[r * routing.experts..(r + 1) * routing.experts],
                            &residual[r * HIDDEN..(r + 1) * HIDDEN],
                        ];
                        let got = &all[r * HIDDEN..(r + 1) * HIDDEN];
                        let chosen = choice(&routing, data[1], bias.as_ref());
                        let want = reference(&layer, &chosen, data[0], data[2]);
                        let weight: f64 = chosen.iter().map(|c| c.1).sum();
                        let what = format!("{} {dtype:?} {routing:?}", ops.isa());
                        assert_close(got, &want, 3e-5 * weight.max(1.0), &what);
                        assert_same(&run(&ops, &layer, &routing, bias.as_ref(), data), got, &what);
                    }
                }
            }
        }
    }
}

/// Where each expert adds its own number, the sum tells who was chosen.
#[test]
fn the_lowest_of_equals_is_chosen() {
    let experts = 12;
    let mut layer = layer(experts, DType::F32);
    for (i, [down, bias]) in layer.down.iter_mut().enumerate() {
        *down = tensor(DType::F32, &[HIDDEN, INTER], &[0.0; HIDDEN * INTER], 0);
        *bias = tensor(DType::F32, &[HIDDEN], &[(1 << i) as f32; HIDDEN], 0);
    }
    let sigmoid = Routing { scoring: ExpertScoring::Sigmoid, ..routing(experts, 3) };
    let groups = |by_top_two| Some(ExpertGroups { count: 4, top: 2, by_top_two });
    let mut later = vec![0.0; experts];
    (later[7], later[10]) = (1.0, 1.0);
    for (routing, bias, want) in [
        (sigmoid, None, 0b111),
        (Routing { groups: groups(false), ..sigmoid }, None, 0b111),
        (Routing { groups: groups(true), top_k: 5, ..sigmoid }, None, 0b11111),
        // Groups of three: those of experts 7 and 10 are the best.
        (Routing { groups: groups(true), ..sigmoid }, Some(&later), 1 << 7 | 1 << 10 | 1 << 6),
        (sigmoid, Some(&later), 1 << 7 | 1 << 10 | 1),
    ] {
        for ops in devices(Compute::F32, 1) {
            let got =
                run(&ops, &layer, &routing, bias, [&[0.5; HIDDEN], &vec![0.0; experts], &[0.0; HIDDEN]]);
            // Each weight is a half.
            assert_eq!(got, [f32::from(want as u16) / 2.0; HIDDEN], "{} {routing:?}", ops.isa());
        }
    }
}

#[test]
fn a_token_that_is_no_number_harms_no_other() {
    let (routing, layer) = (routing(8, 2), layer(8, DType::Bf16));
    let mut rng = Rng::new(3);
    let (x, logits, residual) = (rng.units(3 * HIDDEN), rng.units(24), rng.units(3 * HIDDEN));
    let mut broken = (x.clone(), logits.clone());
    broken.0[HIDDEN..2 * HIDDEN].fill(f32::NAN);
    broken.1[8..16].fill(f32::NAN);
    for ops in devices(Compute::Bf16, 2) {
        let want = run(&ops, &layer, &routing, None, [&x, &logits, &residual]);
        let got = run(&ops, &layer, &routing, None, [&broken.0, &broken.1, &residual]);
        for row in [0, 2] {
            let at = row * HIDDEN..(row + 1) * HIDDEN;
            assert_same(&got[at.clone()], &want[at], ops.isa().name());
        }
        assert!(got[HIDDEN..2 * HIDDEN].iter().all(|v| v.is_nan()));
    }
}

#[test]
fn impossible_choices_are_refused() {
    let ops = &devices(Compute::F32, 1)[0];
    let groups = |count, top| Some(ExpertGroups { count, top, by_top_two: false });
    for routing in [
        routing(4, 0),
        routing(4, 5),
        Routing { groups: groups(3, 1), ..routing(4, 1) },
        Routing { groups: groups(2, 3), ..routing(4, 1) },
        Routing { groups: groups(4, 1), ..routing(8, 3) },
    ] {
        assert!(matches!(ops.routes(1, &routing), Err(KernelError::Unsupported { .. })), "{routing:?}");
    }
}
