//! Every option of a spec, on rows short and long.

use tidemill_kernels::sampling::{RowTask, SampleSpec, gumbel, noise_bits};

use super::*;
use crate::{
    common::Rng,
    words::{device, on_every_schedule},
};

#[test]
fn every_option_agrees_with_the_cpu() {
    let ops = cpu();
    on_every_schedule(|device, driver| {
        for vocab in [2, 31, 1000] {
            for row in rows(vocab, vocab as u64) {
                let cases: Vec<Case> = specs(vocab).into_iter().map(|spec| drawn(&row, spec)).collect();
                check(device, driver, &ops, &cases);
            }
        }
    });
}

#[test]
fn long_rows_agree_with_the_cpu_whether_their_candidates_fit_a_list_or_not() {
    let ops = cpu();
    on_every_schedule(|device, driver| {
        let rows = rows(5003, 5);
        let cases: Vec<Case> =
            specs(5003).into_iter().enumerate().map(|(i, spec)| drawn(&rows[i % rows.len()], spec)).collect();
        check(device, driver, &ops, &cases);
        // Flat rows, and rows of nothing but ties, have more candidates than a list holds.
        let equal = vec![1.5; 5003];
        let wide = |seed| {
            [
                SampleSpec { top_p: 0.9, ..spec(seed) },
                SampleSpec { top_p: 0.9, min_p: 0.985, ..spec(seed) },
                SampleSpec { top_k: 3000, ..spec(seed) },
                SampleSpec { top_k: 4000, top_p: 0.7, min_p: 0.97, ..spec(seed) },
                SampleSpec { top_p: 0.97, temperature: 50.0, ..spec(seed) },
                SampleSpec { min_p: 0.98, ..spec(seed) },
            ]
        };
        let seeded = |seed| {
            wide(seed).map(|spec| [&rows[0], &rows[1], &rows[3], &equal].map(|r| drawn(r, spec.clone())))
        };
        let cases: Vec<Case> = (1..3).flat_map(seeded).flatten().collect();
        check(device, driver, &ops, &cases);
    });
}

#[test]
fn many_draws_give_the_tokens_of_the_cpu() {
    let ops = cpu();
    let (device, driver) = device();
    for vocab in [7, 50] {
        let row: Vec<f32> = Rng::new(vocab as u64).units(vocab).iter().map(|v| v * 3.0).collect();
        for filter in [
            spec(0),
            SampleSpec { top_p: 0.8, ..spec(0) },
            SampleSpec { top_k: 3, ..spec(0) },
            SampleSpec { top_k: 4, top_p: 0.8, temperature: 2.0, ..spec(0) },
        ] {
            let one =
                |seed: u64| SampleSpec { seed: seed << 31 | seed, position: seed as u32, ..filter.clone() };
            let cases: Vec<Case> = (0..150).map(|seed| drawn(&row, one(seed))).collect();
            check(&device, &driver, &ops, &cases);
        }
    }
}

#[test]
fn draws_among_more_candidates_than_a_list_holds_stop_at_the_cut() {
    let ops = cpu();
    let (device, driver) = device();
    // Three bins of the histogram: the cut lies in the middle of the last.
    let row: Vec<f32> = Rng::new(4).units(5003).iter().map(|v| v * 0.02).collect();
    let filters = [
        SampleSpec { top_p: 0.85, ..spec(0) },
        SampleSpec { top_k: 4200, ..spec(0) },
        SampleSpec { top_k: 4600, top_p: 0.9, ..spec(0) },
    ];
    let seeded = |seed| filters.clone().map(|filter| drawn(&row, SampleSpec { seed, ..filter }));
    let cases: Vec<Case> = (0..40).flat_map(seeded).collect();
    check(&device, &driver, &ops, &cases);
}

#[test]
fn a_token_far_below_the_largest_wins_by_its_noise() {
    let ops = cpu();
    let (device, driver) = device();
    let vocab = 64;
    // One of the two largest noises that there are, once in 2^23 tokens, where token 0 has less than 0.3.
    let (seed, token) = (0..u64::MAX)
        .filter(|&seed| gumbel(noise_bits(seed, 3, 0)) < 0.3)
        .find_map(|seed| {
            (1..vocab).find(|&t| noise_bits(seed, 3, t) >= (1 << 24) - 2).map(|token| (seed, token))
        })
        .unwrap();
    let mut row = vec![-90.0; vocab as usize];
    (row[0], row[token as usize]) = (0.0, -15.5);
    let far = SampleSpec { position: 3, ..spec(seed) };
    let cases = [
        far.clone(),
        SampleSpec { top_k: 2, ..far.clone() },
        SampleSpec { top_p: 0.999_999_9, ..far.clone() },
        SampleSpec { min_p: 1e-7, ..far.clone() },
        SampleSpec { min_p: 1e-6, ..far.clone() },
        SampleSpec { temperature: 0.5, ..far },
    ]
    .map(|spec| drawn(&row, spec));
    check(&device, &driver, &ops, &cases);
    let got = run(&device, &driver, &cases).results;
    assert_eq!([0, 1, 3, 4].map(|i| got[i].token), [token, token, token, 0]);
}

#[test]
fn bias_penalties_and_forbidden_tokens_come_in_their_order() {
    let ops = cpu();
    on_every_schedule(|device, driver| {
        let row = [2.0, 1.0, -1.0, 0.5, f32::NEG_INFINITY];
        let with = |change: &dyn Fn(&mut SampleSpec)| {
            let mut spec = greedy();
            change(&mut spec);
            case(&row, RowTask::Sample(spec, Some(5)))
        };
        let inf = f32::INFINITY;
        let cases = [
            with(&|s| s.logit_bias = vec![(2, 3.5)]),
            with(&|s| s.logit_bias = vec![(3, inf), (0, -inf)]),
            with(&|s| s.logit_bias = vec![(0, -inf), (1, -inf)]),
            with(&|s| s.logit_bias = vec![(4, 1e30)]),
            with(&|s| (s.repetition_penalty, s.token_counts) = (2.5, vec![(0, 0)])),
            with(&|s| (s.repetition_penalty, s.token_counts) = (0.1, vec![(2, 1), (3, 0)])),
            with(&|s| (s.presence_penalty, s.token_counts) = (1.2, vec![(0, 3)])),
            with(&|s| (s.presence_penalty, s.token_counts) = (1.2, vec![(0, 0)])),
            with(&|s| (s.frequency_penalty, s.token_counts) = (0.4, vec![(0, 2)])),
            with(&|s| (s.frequency_penalty, s.token_counts) = (0.4, vec![(0, 3)])),
            with(&|s| {
                s.logit_bias = vec![(0, -3.0), (1, -3.0)];
                (s.repetition_penalty, s.token_counts) = (3.0, vec![(0, 1)]);
                s.forbidden = vec![0, 3, 3];
            }),
            with(&|s| s.forbidden = vec![0, 1, 2, 3, 4]),
            with(&|s| (s.temperature, s.logit_bias) = (1.0, vec![(3, inf), (1, inf)])),
            with(&|s| (s.temperature, s.top_k, s.logit_bias) = (1.0, 2, vec![(3, inf), (1, inf)])),
        ];
        check(device, driver, &ops, &cases);
    });
}

#[test]
fn a_mask_is_the_same_as_all_other_tokens_forbidden() {
    let ops = cpu();
    on_every_schedule(|device, driver| {
        for vocab in [31, 1000] {
            let row = &rows(vocab, 9)[1];
            let mut mask: Vec<u32> = (0..vocab.div_ceil(32)).map(|i| 0x1010_8421 << (i % 3)).collect();
            let with = |spec: SampleSpec, mask: &[u32]| {
                case(row, RowTask::Sample(SampleSpec { allowed: Some(mask.into()), ..spec }, Some(3)))
            };
            let mut cases: Vec<Case> = [
                greedy(),
                spec(3),
                SampleSpec { top_k: 3, ..spec(4) },
                SampleSpec { top_p: 0.6, logit_bias: vec![(0, 9.0), (1, 9.0)], ..spec(5) },
            ]
            .into_iter()
            .map(|spec| with(spec, &mask))
            .collect();
            mask.fill(0);
            cases.push(with(spec(6), &mask));
            check(device, driver, &ops, &cases);
        }
    });
}
