//! `sampling.cu` and `logprobs.cu` against `CpuOps::sample`.

use std::sync::Arc;

use tidemill_kernels::{
    KernelError, Ops,
    cpu::{Compute, CpuOps},
    cuda::{
        Device,
        driver::Driver,
        memory::DeviceMemory,
        ops::{BlockShape, Needs, RESULT_WORDS, Sample, Sampler, decode_results, encode, list_words, sample},
        words::DeviceWords,
    },
    sampling::{RowTask, SampleSpec, Sampled, noise_bits},
};

use crate::{
    common::{Rng, buffer, devices},
    harness::{copy_out, f32s},
    words::{copy_in, device, download, on_every_schedule, upload},
};

const POISON: u32 = 0xdead_beef;

fn spec(seed: u64) -> SampleSpec {
    SampleSpec {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed,
        position: seed as u32 % 13,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        token_counts: vec![],
        logit_bias: vec![],
        forbidden: vec![],
    }
}

fn greedy() -> SampleSpec {
    SampleSpec { temperature: 0.0, ..spec(0) }
}

/// A row of logits, what is asked of it, and the tokens that a grammar allows.
#[derive(Clone)]
struct Case {
    logits: Vec<f32>,
    task: RowTask,
    allowed: Option<Vec<u32>>,
}

fn case(logits: &[f32], task: RowTask) -> Case {
    Case { logits: logits.to_vec(), task, allowed: None }
}

fn drawn(logits: &[f32], spec: SampleSpec) -> Case {
    case(logits, RowTask::Sample(spec, None))
}

/// What the device gave.
struct Run {
    results: Vec<Sampled>,
    /// The results' words, of the words that count.
    words: Vec<Vec<u32>>,
    feedback: Vec<u32>,
}

struct Bench {
    tasks: Vec<RowTask>,
    shape: BlockShape,
    sampler: Sampler,
    results: Vec<u32>,
    block: DeviceMemory,
    feedback: DeviceMemory,
    needs: Needs,
}

impl Bench {
    /// Memory for `cases` and `padding` rows more.
    fn new(device: &Device, driver: &Arc<dyn Driver>, cases: &[Case], padding: usize) -> Self {
        let tasks: Vec<RowTask> = cases.iter().map(|c| c.task.clone()).collect();
        let allowed: Vec<Option<&[u32]>> = cases.iter().map(|c| c.allowed.as_deref()).collect();
        let (rows, vocab) = (cases.len() + padding, cases[0].logits.len());
        let shape = BlockShape { rows, vocab, list_words: list_words(&tasks, &allowed) };
        let encoded = encode(shape, &tasks, &allowed).unwrap();
        let sampler = Sampler::new(device, shape).unwrap();
        let mut words = encoded.words;
        assert!(words.len() <= shape.words());
        words.resize(shape.words(), POISON);
        let block = upload(driver, &words);
        let feedback = upload(driver, &vec![POISON; rows]);
        Self { tasks, shape, sampler, results: vec![], block, feedback, needs: encoded.needs }
    }

    fn run(&mut self, device: &Device, driver: &Arc<dyn Driver>, cases: &[Case], needs: Needs) -> Run {
        let mut logits: Vec<f32> = cases.iter().flat_map(|c| c.logits.clone()).collect();
        logits.resize(self.shape.rows * self.shape.vocab, f32::NAN);
        let mut logits = f32s(device, &logits);
        let call = Sample {
            sampler: &mut self.sampler,
            logits: &mut logits,
            block: DeviceWords::new(&self.block),
            shape: self.shape,
            feedback: DeviceWords::new(&self.feedback),
            needs,
        };
        sample(device, call).unwrap();
        self.finish(driver)
    }

    fn finish(&mut self, driver: &Arc<dyn Driver>) -> Run {
        let mut words = vec![0; self.shape.rows * RESULT_WORDS];
        let from = self.sampler.results().at_least("test", "results", words.len()).unwrap();
        copy_out(driver.as_ref(), from, &mut words);
        self.results = words;
        let results = decode_results(&self.results, &self.tasks);
        let words = results.iter().zip(self.results.chunks(RESULT_WORDS)).map(|(result, words)| {
            let top = result.logprobs.as_ref().map_or(0, |l| l.top.len());
            let used = if result.logprobs.is_some() { 5 } else { 2 };
            [&words[..used], &words[8..8 + top], &words[28..28 + top]].concat()
        });
        Run { words: words.collect(), results, feedback: download(driver, &self.feedback) }
    }
}

fn run(device: &Device, driver: &Arc<dyn Driver>, cases: &[Case]) -> Run {
    let mut bench = Bench::new(device, driver, cases, 0);
    let needs = bench.needs;
    bench.run(device, driver, cases, needs)
}

fn cpu() -> CpuOps {
    devices(Compute::Bf16, 1).pop().unwrap()
}

/// The reference; a mask is the same as all other tokens forbidden.
fn expected(ops: &CpuOps, case: &Case) -> Sampled {
    let mut task = case.task.clone();
    if let (RowTask::Sample(spec, _), Some(mask)) = (&mut task, &case.allowed) {
        let refused = |t: &u32| mask[*t as usize / 32] >> (t % 32) & 1 == 0;
        spec.forbidden.extend((0..case.logits.len() as u32).filter(refused));
    }
    let mut logits = buffer(ops, &case.logits);
    let batch = ops.upload(Arc::default(), [task].into()).unwrap();
    ops.sample(&mut logits, case.logits.len(), &batch, 0..1).unwrap();
    ops.wait(ops.results(batch).unwrap()).unwrap().remove(0)
}

#[track_caller]
fn assert_agrees(got: &Sampled, want: &Sampled, case: &Case) {
    let what = format!("V = {}, {:?}", case.logits.len(), case.task);
    assert_eq!((got.finite, got.token), (want.finite, want.token), "{what}");
    let (got, want) = match (&got.logprobs, &want.logprobs) {
        (Some(got), Some(want)) => (got, want),
        (got, want) => return assert_eq!(got.is_some(), want.is_some(), "{what}"),
    };
    assert_eq!(got.rank, want.rank, "{what}");
    let ids = |l: &[(u32, f32)]| l.iter().map(|t| t.0).collect::<Vec<_>>();
    assert_eq!(ids(&got.top), ids(&want.top), "{what}");
    let values = |l: &tidemill_kernels::sampling::Logprobs| {
        std::iter::once(l.logprob).chain(l.top.iter().map(|t| t.1)).collect::<Vec<_>>()
    };
    for (g, w) in values(got).into_iter().zip(values(want)) {
        // Sums of f32 exponentials on both sides, each within 1.3 units; one rounding of the result.
        assert!(g == w || (g - w).abs() <= 2e-7 * w.abs() + 1e-6, "{g} instead of {w}: {what}");
    }
}

#[track_caller]
fn check(device: &Device, driver: &Arc<dyn Driver>, ops: &CpuOps, cases: &[Case]) {
    let run = run(device, driver, cases);
    for (i, (got, case)) in run.results.iter().zip(cases).enumerate() {
        assert_agrees(got, &expected(ops, case), case);
        let fed = if matches!(case.task, RowTask::Sample(..)) { got.token } else { POISON };
        assert_eq!(run.feedback[i], fed, "feedback of row {i}");
    }
}

/// Rows of different temper: flat, common, peaked, with many equal logits, far from zero.
fn rows(vocab: usize, seed: u64) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(seed);
    let mut row = |f: fn(f32) -> f32| rng.units(vocab).into_iter().map(f).collect::<Vec<f32>>();
    vec![
        row(|v| v * 0.02),
        row(|v| v * 3.0),
        row(|v| v * v * v * 40.0),
        row(|v| (v * 4.0).round()),
        row(|v| v * 8.0 - 500.0),
    ]
}

/// Every option of a spec, alone and together.
fn specs(vocab: usize) -> Vec<SampleSpec> {
    let v = vocab as u32;
    let s = spec;
    let counts: Vec<(u32, u32)> = (0..v).step_by(3).map(|t| (t, t % 4)).collect();
    let bias: Vec<(u32, f32)> = (0..v).step_by(2).map(|t| (t, (t % 7) as f32 - 3.0)).collect();
    let penalties = SampleSpec {
        repetition_penalty: 1.3,
        presence_penalty: 0.7,
        frequency_penalty: 0.2,
        token_counts: counts,
        ..s(30)
    };
    let edited = SampleSpec { logit_bias: bias, forbidden: vec![v - 1, 0, v - 1], ..penalties.clone() };
    vec![
        greedy(),
        s(1),
        SampleSpec { temperature: 0.3, ..s(2) },
        SampleSpec { temperature: 5.0, ..s(3) },
        SampleSpec { top_k: 1, ..s(4) },
        SampleSpec { top_k: 5, ..s(5) },
        SampleSpec { top_k: v, ..s(6) },
        SampleSpec { top_k: v - 1, temperature: 0.9, ..s(7) },
        SampleSpec { top_k: v / 2 + 1, ..s(8) },
        SampleSpec { top_p: 0.0, ..s(9) },
        SampleSpec { top_p: 1e-9, ..s(10) },
        SampleSpec { top_p: 0.5, temperature: 0.8, ..s(11) },
        SampleSpec { top_p: 0.95, ..s(12) },
        SampleSpec { top_p: 0.999_999, temperature: 3.0, ..s(13) },
        SampleSpec { min_p: 0.05, ..s(14) },
        SampleSpec { min_p: 1.0, ..s(15) },
        SampleSpec { top_k: 20, top_p: 0.9, temperature: 0.6, ..s(16) },
        SampleSpec { top_k: v / 2 + 1, top_p: 0.7, min_p: 0.01, temperature: 1.7, ..s(17) },
        penalties.clone(),
        SampleSpec { temperature: 0.0, ..penalties },
        SampleSpec { top_p: 0.8, ..edited.clone() },
        SampleSpec { temperature: 0.0, ..edited },
    ]
}

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
    // One of the two largest noises that there are, once in 2^23 tokens.
    let (seed, token) = (0..u64::MAX)
        .find_map(|seed| {
            (1..vocab).find(|&t| noise_bits(seed, 3, t) >= (1 << 24) - 2).map(|token| (seed, token))
        })
        .unwrap();
    let mut row = vec![-90.0; vocab as usize];
    (row[0], row[token as usize]) = (0.0, -13.0);
    let far = SampleSpec { position: 3, ..spec(seed) };
    let cases = [
        far.clone(),
        SampleSpec { top_k: 2, ..far.clone() },
        SampleSpec { top_p: 0.999_999_9, ..far.clone() },
        SampleSpec { min_p: 1e-6, ..far.clone() },
        SampleSpec { min_p: 1e-5, ..far.clone() },
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
            let with = |spec: SampleSpec, mask: &[u32]| Case {
                allowed: Some(mask.to_vec()),
                ..case(row, RowTask::Sample(spec, Some(3)))
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

#[test]
fn log_probabilities_are_of_the_raw_logits_for_samples_and_scores() {
    let ops = cpu();
    on_every_schedule(|device, driver| {
        for vocab in [2, 31, 1000, 5003] {
            let mut cases = vec![];
            for row in rows(vocab, 17) {
                for (i, top) in [0, 5, 20].into_iter().enumerate() {
                    let v = vocab as u32;
                    let edited = SampleSpec {
                        logit_bias: vec![(v / 2, 3.0 + 20.0 * i as f32), (v - 1, -1.0)],
                        token_counts: vec![(v / 2, 2), (0, 1)],
                        repetition_penalty: 1.2,
                        presence_penalty: 0.3,
                        forbidden: vec![0, v - 1],
                        top_k: i as u32,
                        ..spec(7)
                    };
                    cases.push(case(&row, RowTask::Sample(spec(top.into()), Some(top))));
                    if vocab > 2 {
                        cases.push(case(&row, RowTask::Sample(edited, Some(top))));
                    }
                    cases.push(case(&row, RowTask::Score(v / 3, top)));
                }
            }
            // Ties of the whole row, deep rows, signed zeros.
            cases.push(case(&vec![0.25; vocab], RowTask::Score(vocab as u32 / 2, 20)));
            let deep: Vec<f32> = (0..vocab).map(|i| i as f32 * -50.0).collect();
            cases.push(case(&deep, RowTask::Score(1, 7)));
            let zeros: Vec<f32> = (0..vocab).map(|i| if i % 2 == 0 { -0.0 } else { 0.0 }).collect();
            cases.push(case(&zeros, RowTask::Score(1, 4)));
            cases.push(case(&zeros, RowTask::Sample(SampleSpec { top_k: 1, ..spec(3) }, Some(2))));
            check(device, driver, &ops, &cases);
        }
    });
}

#[test]
fn broken_rows_are_reported_and_infinite_ones_are_not() {
    let ops = cpu();
    on_every_schedule(|device, driver| {
        let mut nan = Rng::new(1).units(300);
        nan[257] = f32::NAN;
        let nothing = vec![f32::NEG_INFINITY; 300];
        let mut infinite = Rng::new(2).units(300);
        (infinite[11], infinite[200], infinite[5]) = (f32::INFINITY, f32::INFINITY, f32::NEG_INFINITY);
        let hidden = SampleSpec { forbidden: vec![257], ..spec(1) };
        let tasks = [
            RowTask::Sample(greedy(), None),
            RowTask::Sample(spec(1), Some(3)),
            RowTask::Sample(SampleSpec { top_k: 7, ..spec(2) }, Some(0)),
            RowTask::Sample(SampleSpec { top_p: 0.5, ..spec(3) }, None),
            RowTask::Sample(hidden, None),
            RowTask::Score(200, 3),
            RowTask::Score(7, 5),
        ];
        for row in [&nan, &nothing, &infinite] {
            let cases: Vec<Case> = tasks.iter().map(|task| case(row, task.clone())).collect();
            check(device, driver, &ops, &cases);
        }
        let got = run(device, driver, &[case(&nan, tasks[4].clone()), case(&infinite, tasks[0].clone())]);
        assert_eq!((got.results[0].finite, got.results[1].finite), (false, true));
        // A bias can make a NaN where the model gave none.
        let bias = SampleSpec { logit_bias: vec![(11, f32::NEG_INFINITY)], ..greedy() };
        assert!(!run(device, driver, &[drawn(&infinite, bias)]).results[0].finite);
    });
}

#[test]
fn a_row_gives_the_same_bits_alone_and_among_33_and_however_many_blocks_share_it() {
    let (device, driver) = device();
    for vocab in [31, 5003, 12_289] {
        let rows = rows(vocab, 3);
        let mut cases: Vec<Case> = specs(vocab)
            .into_iter()
            .enumerate()
            .map(|(i, spec)| case(&rows[i % rows.len()], RowTask::Sample(spec, (i % 3 == 0).then_some(6))))
            .collect();
        cases.extend((0..11).map(|i| case(&rows[i % rows.len()], RowTask::Score(i as u32, i as u32))));
        assert_eq!(cases.len(), 33);
        let together = run(&device, &driver, &cases);
        for (one, want) in cases.iter().zip(&together.words) {
            assert_eq!(&run(&device, &driver, std::slice::from_ref(one)).words[0], want, "{:?}", one.task);
        }
    }
}

#[test]
fn padding_rows_are_left_alone_and_kernels_without_work_change_nothing() {
    on_every_schedule(|device, driver| {
        let row = &rows(100, 4)[1];
        let cases = [drawn(row, spec(1)), drawn(row, greedy()), drawn(row, spec(9))];
        let mut bench = Bench::new(device, driver, &cases, 3);
        assert_eq!(bench.needs, Needs::default());
        let few = bench.run(device, driver, &cases, Needs::default());
        let all = bench.run(device, driver, &cases, Needs::ALL);
        assert_eq!(few.words, all.words);
        assert_eq!(all.feedback[3..], [POISON; 3]);
        assert_eq!(all.feedback[..3], [0, 1, 2].map(|i| all.results[i].token));
        // What a step's kernels leave out is not made up.
        let asks =
            [drawn(row, SampleSpec { top_k: 5, ..spec(2) }), case(row, RowTask::Sample(spec(3), Some(2)))];
        let mut bench = Bench::new(device, driver, &asks, 0);
        assert_eq!(bench.needs, Needs::ALL);
        let few = bench.run(device, driver, &asks, Needs::default());
        assert!(!few.results[0].finite);
        assert!(few.results[1].finite && few.results[1].logprobs.is_none());
    });
}

#[test]
fn a_captured_graph_serves_other_tasks() {
    let ops = cpu();
    let (device, driver) = device();
    let row = &rows(1000, 6)[1];
    let first = [drawn(row, SampleSpec { forbidden: vec![1, 2], ..spec(1) }), drawn(row, spec(2))];
    let second = [
        case(row, RowTask::Score(5, 2)),
        drawn(row, SampleSpec { top_p: 0.9, logit_bias: vec![(3, 9.0)], ..spec(3) }),
    ];
    let mut bench = Bench::new(&device, &driver, &first, 0);
    let mut logits = f32s(&device, &[row.as_slice(), row].concat());
    let shape = bench.shape;
    driver.begin_capture().unwrap();
    let call = Sample {
        sampler: &mut bench.sampler,
        logits: &mut logits,
        block: DeviceWords::new(&bench.block),
        shape,
        feedback: DeviceWords::new(&bench.feedback),
        needs: Needs::ALL,
    };
    sample(&device, call).unwrap();
    let graph = driver.end_capture().unwrap();
    for cases in [&first, &second] {
        bench.tasks = cases.iter().map(|c| c.task.clone()).collect();
        copy_in(&driver, &bench.block, &encode(shape, &bench.tasks, &[]).unwrap().words);
        let words: Vec<u32> = row.iter().chain(row).map(|x| x.to_bits()).collect();
        // SAFETY: the logits hold two rows; the graph's memory lives.
        unsafe {
            driver.copy_to_device(logits.ptr(), words.as_ptr().cast(), 4 * words.len()).unwrap();
            driver.launch_graph(graph).unwrap();
        }
        let got = bench.finish(&driver);
        for (got, case) in got.results.iter().zip(cases) {
            assert_agrees(got, &expected(&ops, case), case);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (device, driver) = device();
    let shape = BlockShape { rows: 2, vocab: 10, list_words: 4 };
    let attempt = |shape: BlockShape, logits: usize, words: usize, feedback: usize| {
        let mut sampler = Sampler::new(&device, BlockShape { rows: 2, vocab: 10, list_words: 4 }).unwrap();
        let (block, feedback) = (upload(&driver, &vec![0; words]), upload(&driver, &vec![0; feedback]));
        let mut logits = f32s(&device, &vec![0.0; logits]);
        let call = Sample {
            sampler: &mut sampler,
            logits: &mut logits,
            block: DeviceWords::new(&block),
            shape,
            feedback: DeviceWords::new(&feedback),
            needs: Needs::ALL,
        };
        sample(&device, call)
    };
    assert!(attempt(shape, 20, 44, 2).is_ok());
    let refused = |result| matches!(result, Err(KernelError::Shape { op: "sample", .. }));
    assert!(refused(attempt(shape, 19, 44, 2)));
    assert!(refused(attempt(shape, 20, 43, 2)));
    assert!(refused(attempt(shape, 20, 44, 1)));
    assert!(refused(attempt(BlockShape { rows: 3, ..shape }, 30, 64, 3)));
    assert!(refused(attempt(BlockShape { vocab: 9, ..shape }, 20, 44, 2)));
    assert!(refused(attempt(BlockShape { list_words: 5, ..shape }, 20, 45, 2)));
    let huge = Sampler::new(&device, BlockShape { vocab: (1 << 20) + 1, ..shape });
    assert!(matches!(huge, Err(KernelError::Unsupported { op: "sample", .. })));
}
