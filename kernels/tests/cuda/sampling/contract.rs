//! Log-probabilities, broken rows, batch invariance, graphs, and what is refused.

use tidemill_kernels::KernelError;

use super::*;
use crate::words::{copy_in, device, on_every_schedule};

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
        // Infinite logits share all the probability, with and without filters.
        let draws: Vec<Case> = (0..8)
            .flat_map(|seed| {
                [spec(seed), SampleSpec { top_p: 0.9, ..spec(seed) }].map(|s| drawn(&infinite, s))
            })
            .collect();
        check(device, driver, &ops, &draws);
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
        copy_in(&driver, &bench.block, &encode(shape, &bench.tasks).unwrap().words);
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
    for huge in [BlockShape { vocab: 1 << 20, ..shape }, BlockShape { rows: 65_536, ..shape }] {
        let refused = Sampler::new(&device, huge);
        assert!(matches!(refused, Err(KernelError::Unsupported { op: "sample", .. })));
    }
}
