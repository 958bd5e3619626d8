//! `Ops::sample`: filters, penalties and log-probabilities against plain definitions, and the statistics of the draw.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{Rng, buffer, devices};
use tidemill_kernels::{
    Ops,
    cpu::{Compute, CpuOps},
    sampling::{Logprobs, RowTask, SampleSpec, Sampled, gumbel, noise_bits, philox4x32_10},
};

fn spec() -> SampleSpec {
    SampleSpec {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1,
        position: 0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        token_counts: vec![],
        logit_bias: vec![],
        forbidden: vec![],
        allowed: None,
    }
}

fn greedy() -> SampleSpec {
    SampleSpec { temperature: 0.0, ..spec() }
}

fn sample(ops: &CpuOps, row: &[f32], tasks: &[RowTask]) -> Vec<Sampled> {
    let rows: Vec<f32> = tasks.iter().flat_map(|_| row).copied().collect();
    let batch = ops.upload(Arc::default(), tasks.into()).unwrap();
    ops.sample(&mut buffer(ops, &rows), row.len(), &batch, 0..tasks.len()).unwrap();
    ops.wait(ops.results(batch).unwrap()).unwrap().sampled
}

fn one(ops: &CpuOps, row: &[f32], spec: SampleSpec) -> u32 {
    let got = sample(ops, row, &[RowTask::Sample(spec, None)]);
    assert!(got[0].finite && got[0].logprobs.is_none());
    got[0].token
}

/// How often each token comes in `n` draws at different positions.
fn histogram(ops: &CpuOps, row: &[f32], spec: &SampleSpec, n: u32) -> Vec<u32> {
    let tasks: Vec<RowTask> =
        (0..n).map(|position| RowTask::Sample(SampleSpec { position, ..spec.clone() }, None)).collect();
    let mut counts = vec![0; row.len()];
    for got in sample(ops, row, &tasks) {
        assert!(got.finite);
        counts[got.token as usize] += 1;
    }
    counts
}

fn survivors(ops: &CpuOps, row: &[f32], spec: &SampleSpec) -> Vec<usize> {
    let counts =
        histogram(ops, row, &SampleSpec { temperature: spec.temperature.max(0.01), ..spec.clone() }, 3000);
    (0..row.len()).filter(|&i| counts[i] > 0).collect()
}

fn softmax(row: &[f32], temperature: f64) -> Vec<f64> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f64> = row.iter().map(|&x| (f64::from(x - max) / temperature).exp()).collect();
    let total: f64 = e.iter().sum();
    e.iter().map(|x| x / total).collect()
}

#[test]
fn philox_gives_the_published_numbers() {
    // kat_vectors of Random123 (Salmon et al.).
    assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox4x32_10([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    assert_eq!(
        philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
    );
}

#[test]
fn noise_is_finite_at_both_ends() {
    assert!((gumbel(0) + 2.8526).abs() < 1e-3);
    assert!((gumbel((1 << 24) - 1) - 17.3287).abs() < 1e-3);
}

#[test]
fn greedy_takes_the_lowest_of_the_largest() {
    for ops in devices(Compute::Bf16, 1) {
        let mut row = Rng::new(1).units(1000);
        (row[300], row[700]) = (2.0, 2.0);
        assert_eq!(one(&ops, &row, greedy()), 300);
        assert_eq!(one(&ops, &row, SampleSpec { forbidden: vec![300], ..greedy() }), 700);
        assert_eq!(one(&ops, &[-1.0], greedy()), 0);
        assert_eq!(one(&ops, &[f32::NEG_INFINITY, -1e30], greedy()), 1);
    }
}

#[test]
fn the_draw_is_the_argmax_of_logits_and_noise() {
    for ops in devices(Compute::Bf16, 1) {
        for (seed, spread, temperature) in
            [(1, 0.0, 1.0), (2, 3.0, 0.7), (3, 30.0, 1.0), (4, 8.0, 5.0), (5, 3000.0, 100.0)]
        {
            let row: Vec<f32> = Rng::new(seed).units(777).iter().map(|v| v * spread).collect();
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for position in 0..50 {
                let spec = SampleSpec { temperature, seed: seed << 33 | 5, position, ..spec() };
                let sum = |t: usize| {
                    f64::from((row[t] - max) / temperature)
                        + gumbel(noise_bits(spec.seed, position, t as u32))
                };
                let want = (0..row.len()).fold(0, |best, t| if sum(t) > sum(best) { t } else { best });
                assert_eq!(one(&ops, &row, spec.clone()), want as u32, "{} {seed} {position}", ops.isa());
            }
        }
    }
}

#[test]
fn draws_follow_the_softmax() {
    for ops in devices(Compute::Bf16, 2) {
        let row: Vec<f32> = Rng::new(8).units(40).iter().map(|v| v * 2.0).collect();
        for temperature in [0.5, 1.0, 2.0] {
            let n = 20_000;
            let counts = histogram(&ops, &row, &SampleSpec { temperature, seed: 42, ..spec() }, n);
            let p = softmax(&row, f64::from(temperature));
            let chi: f64 = counts
                .iter()
                .zip(&p)
                .map(|(&c, p)| (f64::from(c) - p * f64::from(n)).powi(2) / (p * f64::from(n)))
                .sum();
            // 39 degrees of freedom: 72 is exceeded once in a thousand times.
            assert!(chi < 72.0, "{} {temperature}: {chi}", ops.isa());
        }
    }
}

#[test]
fn draws_depend_on_seed_and_position_alone() {
    let ops = &devices(Compute::Bf16, 2)[0];
    let row = Rng::new(3).units(500);
    let task = |seed, position| RowTask::Sample(SampleSpec { seed, position, ..spec() }, None);
    let tasks: Vec<RowTask> = (0..64).map(|i| task(i / 8, (i % 8) as u32)).collect();
    let together = sample(ops, &row, &tasks);
    for (task, want) in tasks.iter().zip(&together) {
        assert_eq!(&sample(ops, &row, std::slice::from_ref(task))[0], want);
    }
    let distinct: std::collections::HashSet<u32> = together.iter().map(|s| s.token).collect();
    assert!(distinct.len() > 40);
}

#[test]
fn top_k_keeps_k_and_the_lowest_ids_of_a_tie() {
    for ops in devices(Compute::Bf16, 1) {
        let row = [1.0, 3.0, 2.0, 2.0, 2.0, -1.0];
        let kept = |top_k| survivors(&ops, &row, &SampleSpec { top_k, temperature: 3.0, ..spec() });
        assert_eq!(kept(1), [1]);
        assert_eq!(kept(2), [1, 2]);
        assert_eq!(kept(3), [1, 2, 3]);
        assert_eq!(kept(5), [0, 1, 2, 3, 4]);
        assert_eq!(kept(0).len(), 6);
        assert_eq!(kept(60).len(), 6);
        let signs = survivors(&ops, &[-0.0, 0.0, -0.0], &SampleSpec { top_k: 2, ..spec() });
        assert_eq!(signs, [0, 1]);
    }
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_it() {
    for ops in devices(Compute::Bf16, 1) {
        // Probabilities 1/2, 1/4, 1/8, 1/8.
        let row = [4_f32.ln(), 2_f32.ln(), 8_f32.ln() - 8_f32.ln(), 0.0, f32::NEG_INFINITY];
        let kept = |top_p| survivors(&ops, &row, &SampleSpec { top_p, ..spec() });
        assert_eq!(kept(0.0), [0]);
        assert_eq!(kept(0.49), [0]);
        assert_eq!(kept(0.51), [0, 1]);
        assert_eq!(kept(0.76), [0, 1, 2]);
        assert_eq!(kept(0.9), [0, 1, 2, 3]);
        assert_eq!(kept(1.0), [0, 1, 2, 3]);
        // After top-k the shares are of what is left: 2/3 and 1/3.
        assert_eq!(survivors(&ops, &row, &SampleSpec { top_p: 0.6, top_k: 2, ..spec() }), [0]);
    }
}

#[test]
fn top_p_and_min_p_agree_with_their_definitions_on_long_rows() {
    for ops in devices(Compute::Bf16, 1) {
        let row: Vec<f32> = Rng::new(21).units(600).iter().map(|v| v * 4.0).collect();
        let p = softmax(&row, 1.0);
        let mut order: Vec<usize> = (0..600).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let (mut mass, mut set) = (0.0, vec![]);
        for &i in &order {
            set.push(i);
            mass += p[i];
            if mass >= 0.8 {
                break;
            }
        }
        for got in survivors(&ops, &row, &SampleSpec { top_p: 0.8, ..spec() }) {
            assert!(set.contains(&got));
        }
        for got in survivors(&ops, &row, &SampleSpec { min_p: 0.3, ..spec() }) {
            assert!(p[got] >= 0.2999 * p[order[0]]);
        }
        // All of them tie: min_p = 1 keeps every one.
        assert_eq!(survivors(&ops, &[1.0; 5], &SampleSpec { min_p: 1.0, ..spec() }).len(), 5);
    }
}

#[test]
fn bias_and_penalties_come_in_their_order() {
    let ops = &devices(Compute::Bf16, 1)[0];
    let row = [2.0, 1.0, -1.0, 0.5];
    assert_eq!(one(ops, &row, SampleSpec { logit_bias: vec![(2, 3.5)], ..greedy() }), 2);
    // (2 + 0) / 2.5 = 0.8 < 1.
    let repeat = |counts| SampleSpec { repetition_penalty: 2.5, token_counts: counts, ..greedy() };
    assert_eq!(one(ops, &row, repeat(vec![(0, 0)])), 1);
    assert_eq!(one(ops, &[-1.0, -2.0], repeat(vec![(0, 1)])), 1);
    let presence = |counts| SampleSpec { presence_penalty: 1.2, token_counts: counts, ..greedy() };
    assert_eq!(one(ops, &row, presence(vec![(0, 3)])), 1);
    assert_eq!(one(ops, &row, presence(vec![(0, 0)])), 0, "the prompt has no presence penalty");
    let frequency = |n| SampleSpec { frequency_penalty: 0.4, token_counts: vec![(0, n)], ..greedy() };
    assert_eq!(one(ops, &row, frequency(2)), 0);
    assert_eq!(one(ops, &row, frequency(3)), 1);
    // The bias is there before the penalty: (2 - 3) * 3 = -3.
    let both = SampleSpec {
        logit_bias: vec![(0, -3.0), (1, -3.0)],
        repetition_penalty: 3.0,
        token_counts: vec![(0, 1)],
        ..greedy()
    };
    assert_eq!(one(ops, &[2.0, 1.0, -2.9], both), 1);
}

#[test]
fn a_mask_is_the_same_as_all_other_tokens_forbidden() {
    for ops in devices(Compute::Bf16, 1) {
        for vocab in [3_u32, 31, 32, 33, 700] {
            let row: Vec<f32> =
                Rng::new(u64::from(vocab)).units(vocab as usize).iter().map(|v| v * 5.0).collect();
            let mask: Arc<[u32]> =
                (0..vocab.div_ceil(32)).map(|word| 0x1248_8421_u32.rotate_left(word)).collect();
            let refused =
                (0..vocab).filter(|t| mask[*t as usize / 32] >> (t % 32) & 1 == 0).collect::<Vec<_>>();
            let specs = [
                greedy(),
                spec(),
                SampleSpec { top_k: 2, ..spec() },
                SampleSpec { top_p: 0.7, logit_bias: vec![(1, 9.0)], ..spec() },
            ];
            for position in 0..20 {
                for spec in &specs {
                    let spec = SampleSpec { position, ..spec.clone() };
                    let masked = SampleSpec { allowed: Some(mask.clone()), ..spec.clone() };
                    let forbidding = SampleSpec { forbidden: refused.clone(), ..spec };
                    let [got, want] =
                        [masked, forbidding].map(|s| sample(&ops, &row, &[RowTask::Sample(s, Some(3))]));
                    assert_eq!(got, want, "{vocab}");
                    assert!(got[0].finite && !refused.contains(&got[0].token));
                }
            }
            let nothing = SampleSpec { allowed: Some(mask.iter().map(|_| 0).collect()), ..spec() };
            assert!(!sample(&ops, &row, &[RowTask::Sample(nothing, None)])[0].finite, "and nothing hangs");
        }
    }
}

#[test]
fn a_mask_of_another_vocabulary_is_refused() {
    let ops = &devices(Compute::Bf16, 1)[0];
    let task = RowTask::Sample(SampleSpec { allowed: Some([1, 1].into()), ..spec() }, None);
    let batch = ops.upload(Arc::default(), [task].into()).unwrap();
    assert!(ops.sample(&mut buffer(ops, &[0.0; 32]), 32, &batch, 0..1).is_err());
}

#[test]
fn broken_rows_are_reported_and_infinite_ones_are_not() {
    for ops in devices(Compute::Bf16, 1) {
        let finite = |row: &[f32], task: RowTask| sample(&ops, row, &[task])[0].finite;
        let mut row = Rng::new(1).units(300);
        row[257] = f32::NAN;
        let nothing = [f32::NEG_INFINITY; 3];
        for task in [RowTask::Sample(spec(), None), RowTask::Sample(greedy(), Some(1)), RowTask::Score(0, 1)]
        {
            assert!(!finite(&row, task.clone()));
            assert!(!finite(&nothing, task));
        }
        let all = SampleSpec { forbidden: vec![0, 1], ..spec() };
        assert!(!finite(&[0.0, 1.0], RowTask::Sample(all, None)));
        let infinite = [0.0, f32::INFINITY, 5.0, f32::INFINITY];
        assert_eq!(one(&ops, &infinite, greedy()), 1);
        assert_eq!(survivors(&ops, &infinite, &spec()), [1, 3]);
        let scored = sample(&ops, &infinite, &[RowTask::Score(3, 3)])[0].logprobs.clone().unwrap();
        assert!((scored.logprob + 2_f32.ln()).abs() < 1e-6);
        assert_eq!(scored.rank, 2);
        assert_eq!(scored.top[2], (2, f32::NEG_INFINITY));
    }
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    for ops in devices(Compute::Bf16, 1) {
        let row: Vec<f32> = Rng::new(12).units(901).iter().map(|v| v * 9.0 + 50.0).collect();
        let p = softmax(&row, 1.0);
        let mut order: Vec<usize> = (0..901).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let spec = SampleSpec { temperature: 0.7, logit_bias: vec![(17, 100.0)], ..spec() };
        let got = sample(&ops, &row, &[RowTask::Sample(spec, Some(5)), RowTask::Score(3, 0)]);
        let check = |got: &Sampled, token: usize, n: usize| {
            let Some(Logprobs { logprob, rank, top }) = &got.logprobs else { panic!("no log-probabilities") };
            assert_eq!(got.token as usize, token);
            assert!((f64::from(*logprob) - p[token].ln()).abs() < 2e-6 * p[token].ln().abs());
            assert_eq!(order[*rank as usize - 1], token);
            assert_eq!(top.iter().map(|t| t.0 as usize).collect::<Vec<_>>(), order[..n]);
            for (id, lp) in top {
                assert!(
                    (f64::from(*lp) - p[*id as usize].ln()).abs() < 2e-6 * p[*id as usize].ln().abs() + 1e-6
                );
            }
        };
        check(&got[0], 17, 5);
        check(&got[1], 3, 0);
    }
}
