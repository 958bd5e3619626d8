//! `moe_route.cu` against f64.

use std::sync::Arc;

use tidemill_kernels::{
    KernelError,
    cuda::{
        Device,
        driver::Driver,
        ops::{MoeRoute, moe_route},
        words::DeviceWords,
    },
    ops::{ExpertGroups, ExpertScoring, Routing},
};

use crate::{
    common::{Rng, assert_same},
    harness::{assert_near, f32s, values},
    words,
};

fn plain(experts: usize, top_k: usize) -> Routing {
    Routing { experts, top_k, scoring: ExpertScoring::Softmax, groups: None, renormalize: false, scale: 1.0 }
}

fn route(
    device: &Device,
    driver: &Arc<dyn Driver>,
    logits: &[f32],
    bias: Option<&[f32]>,
    routing: &Routing,
) -> (Vec<u32>, Vec<f32>) {
    let tokens = logits.len() / routing.experts;
    let ids = words::upload(driver, &vec![0xdead_beef; tokens * routing.top_k]);
    let mut weights = f32s(device, &vec![f32::NAN; tokens * routing.top_k]);
    let (logits, bias) = (f32s(device, logits), bias.map(|bias| f32s(device, bias)));
    let (call_ids, bias) = (DeviceWords::new(&ids), bias.as_ref());
    let call = MoeRoute { ids: call_ids, weights: &mut weights, logits: &logits, bias, routing, tokens };
    moe_route(device, call).unwrap();
    (words::download(driver, &ids), values(device, &weights))
}

/// One token in f64.
fn expected(logits: &[f32], bias: Option<&[f32]>, routing: &Routing) -> (Vec<u32>, Vec<f64>) {
    let logits: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
    let total: f64 = logits.iter().map(|l| l.exp()).sum();
    let score = |l: &f64| match routing.scoring {
        ExpertScoring::Softmax => l.exp() / total,
        ExpertScoring::Sigmoid => 1.0 / (1.0 + (-l).exp()),
    };
    let scores: Vec<f64> = logits.iter().map(score).collect();
    let choice = |e: usize| scores[e] + bias.map_or(0.0, |bias| f64::from(bias[e]));
    let best_first = |candidates: &mut Vec<usize>, value: &dyn Fn(usize) -> f64| {
        candidates.sort_by(|&a, &b| value(b).total_cmp(&value(a)).then(a.cmp(&b)));
    };
    let mut order: Vec<usize> = (0..logits.len()).collect();
    if let Some(ExpertGroups { count, top, by_top_two }) = routing.groups {
        let size = logits.len() / count;
        let value = |group: usize| {
            let mut inside: Vec<f64> = (group * size..(group + 1) * size).map(choice).collect();
            inside.sort_by(|a, b| b.total_cmp(a));
            inside[..if by_top_two { 2 } else { 1 }].iter().sum()
        };
        let mut groups: Vec<usize> = (0..count).collect();
        best_first(&mut groups, &value);
        groups.truncate(top);
        order.retain(|e| groups.contains(&(e / size)));
    }
    best_first(&mut order, &choice);
    order.truncate(routing.top_k);
    let over = if routing.renormalize { order.iter().map(|&e| scores[e]).sum() } else { 1.0 };
    let weights = order.iter().map(|&e| scores[e] / over * f64::from(routing.scale)).collect();
    (order.into_iter().map(|e| e as u32).collect(), weights)
}

/// Compares every token with f64 and with itself alone.
fn check(device: &Device, driver: &Arc<dyn Driver>, logits: &[f32], bias: Option<&[f32]>, routing: &Routing) {
    let (ids, weights) = route(device, driver, logits, bias, routing);
    for (t, row) in logits.chunks(routing.experts).enumerate() {
        let (want_ids, want) = expected(row, bias, routing);
        let span = t * routing.top_k..(t + 1) * routing.top_k;
        assert_eq!(ids[span.clone()], want_ids, "{routing:?}");
        assert_near(&weights[span.clone()], &want, 3e-6, 1e-7, "weights");
        let (alone_ids, alone) = route(device, driver, row, bias, routing);
        assert_eq!(alone_ids, want_ids);
        assert_same(&alone, &weights[span], "a token alone");
    }
}

#[test]
fn routing_by_softmax_agrees_with_f64_and_tokens_stand_alone() {
    words::on_every_schedule(|device, driver| {
        for (tokens, experts, top_k) in
            [(1, 1, 1), (3, 4, 2), (5, 8, 8), (6, 60, 4), (9, 256, 8), (2, 500, 32)]
        {
            // Few different values: many ties.
            let mut rng = Rng::new(experts as u64);
            let logits: Vec<f32> = (0..tokens * experts).map(|_| rng.below(20) as f32 * 0.5 - 4.0).collect();
            for renormalize in [false, true] {
                let routing = Routing { renormalize, ..plain(experts, top_k) };
                check(device, driver, &logits, None, &routing);
            }
        }
    });
}

#[test]
fn routing_by_sigmoid_bias_and_groups_agrees_with_f64() {
    let groups = |count, top, by_top_two| Some(ExpertGroups { count, top, by_top_two });
    let sigmoid = |experts, top_k| Routing { scoring: ExpertScoring::Sigmoid, ..plain(experts, top_k) };
    let cases = [
        (sigmoid(40, 3), false),
        (Routing { renormalize: true, scale: 2.5, ..sigmoid(40, 3) }, true),
        // DeepSeek-V2, DeepSeek-V3.
        (Routing { groups: groups(8, 3, false), scale: 16.0, ..plain(160, 6) }, false),
        (Routing { groups: groups(8, 4, true), renormalize: true, scale: 2.5, ..sigmoid(256, 8) }, true),
        (Routing { groups: groups(2, 1, true), ..plain(4, 2) }, false),
        (Routing { groups: groups(3, 2, false), ..plain(9, 5) }, true),
        (Routing { groups: groups(32, 32, false), renormalize: true, ..sigmoid(32, 2) }, true),
    ];
    words::on_every_schedule(|device, driver| {
        for (i, (routing, biased)) in cases.iter().enumerate() {
            // Different by more than f32 can confuse: of groups, sums may be equal, and chances are that none are.
            let mut rng = Rng::new(i as u64 + 1);
            let logits: Vec<f32> = rng.units(5 * routing.experts).iter().map(|l| 3.0 * l).collect();
            // Some are below 0, so that a choice can be.
            let bias = rng.units(routing.experts);
            check(device, driver, &logits, biased.then_some(&bias), routing);
        }
    });
}

#[test]
fn among_equal_scores_and_groups_the_lowest_come_first() {
    let (device, driver) = words::device();
    let routing = Routing {
        groups: Some(ExpertGroups { count: 4, top: 2, by_top_two: true }),
        scoring: ExpertScoring::Sigmoid,
        ..plain(40, 4)
    };
    let mut logits = vec![0.5; 40];
    assert_eq!(route(&device, &driver, &logits, None, &routing).0, [0, 1, 2, 3]);
    // The third group is better, and of the others the first is taken.
    logits[25] = 0.75;
    assert_eq!(route(&device, &driver, &logits, None, &routing).0, [25, 0, 1, 2]);
}

#[test]
fn routing_of_broken_logits_still_names_different_experts() {
    let (device, driver) = words::device();
    let routing = Routing { renormalize: true, ..plain(40, 3) };
    let grouped = Routing { groups: Some(ExpertGroups { count: 20, top: 2, by_top_two: true }), ..routing };
    let mut one_left = vec![f32::NAN; 40];
    one_left[33] = f32::NEG_INFINITY;
    for (logits, want) in [
        (vec![f32::NAN; 40], [0, 1, 2]),
        (one_left, [33, 0, 1]),
        (vec![f32::NEG_INFINITY; 40], [0, 1, 2]),
        ([vec![0.0], vec![-0.0; 39]].concat(), [0, 1, 2]),
    ] {
        assert_eq!(route(&device, &driver, &logits, None, &routing).0, want);
        let ids = route(&device, &driver, &logits, None, &grouped).0;
        assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2], "{ids:?}");
        assert!(ids.iter().all(|&id| id < 40), "{ids:?}");
    }
}

#[test]
fn routings_that_the_kernel_cannot_take_are_refused() {
    let (device, driver) = words::device();
    let ids = words::upload(&driver, &[0; 8]);
    let (mut weights, logits) = (f32s(&device, &[0.0; 8]), f32s(&device, &[0.0; 8]));
    let mut call = |routing: &Routing, tokens| {
        let (ids, logits) = (DeviceWords::new(&ids), &logits);
        moe_route(&device, MoeRoute { ids, weights: &mut weights, logits, bias: None, routing, tokens })
    };
    call(&plain(4, 2), 2).unwrap();
    let groups = |count, top, by_top_two| Routing {
        groups: Some(ExpertGroups { count, top, by_top_two }),
        ..plain(8, 2)
    };
    call(&groups(4, 1, true), 1).unwrap();
    for routing in [
        plain(513, 1),
        plain(4, 0),
        plain(4, 5),
        plain(64, 33),
        plain(0, 1),
        groups(0, 0, false),
        groups(3, 2, false),
        groups(4, 0, false),
        groups(4, 5, false),
        groups(8, 1, false),
        groups(8, 2, true),
    ] {
        let refused = call(&routing, 1);
        assert!(matches!(refused, Err(KernelError::Unsupported { op: "moe_route", .. })), "{routing:?}");
    }
    assert!(matches!(call(&plain(4, 2), 3), Err(KernelError::Shape { op: "moe_route", .. })));
}
