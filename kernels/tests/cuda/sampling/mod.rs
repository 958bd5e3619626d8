//! `sampling.cu` and `logprobs.cu` against `CpuOps::sample`: what their tests share.

mod choices;
mod contract;

use std::sync::Arc;

use tidemill_kernels::{
    Ops,
    cpu::{Compute, CpuOps},
    cuda::{
        Device,
        driver::Driver,
        memory::DeviceMemory,
        ops::{BlockShape, Needs, RESULT_WORDS, Sample, Sampler, decode_results, encode, list_words, sample},
        words::DeviceWords,
    },
    sampling::{RowTask, SampleSpec, Sampled},
};

use crate::{
    common::{Rng, buffer, devices},
    harness::{copy_out, f32s},
    paged::Bed,
    words::{download, upload},
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
        allowed: None,
    }
}

fn greedy() -> SampleSpec {
    SampleSpec { temperature: 0.0, ..spec(0) }
}

/// A row of logits and what is asked of it.
#[derive(Clone)]
struct Case {
    logits: Vec<f32>,
    task: RowTask,
}

fn case(logits: &[f32], task: RowTask) -> Case {
    Case { logits: logits.to_vec(), task }
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
        let (rows, vocab) = (cases.len() + padding, cases[0].logits.len());
        let shape = BlockShape { rows, vocab, list_words: list_words(&tasks) };
        let encoded = encode(shape, &tasks).unwrap();
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
    if let RowTask::Sample(spec, _) = &mut task
        && let Some(mask) = spec.allowed.take()
    {
        let refused = |t: &u32| mask[*t as usize / 32] >> (t % 32) & 1 == 0;
        spec.forbidden.extend((0..case.logits.len() as u32).filter(refused));
    }
    let mut logits = buffer(ops, &case.logits);
    let batch = ops.upload(Arc::default(), [task].into()).unwrap();
    ops.sample(&mut logits, case.logits.len(), &batch, 0..1).unwrap();
    ops.wait(ops.results(batch).unwrap()).unwrap().sampled.remove(0)
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

/// Runs of every path, for the tests of planted faults.
pub fn sample_of_choices(bed: &Bed) -> Vec<f32> {
    let mut rng = Rng::new(8);
    let row = rng.units(300);
    // Lists overlap, and different threads have a token in each. One token is far above all others only while the edits last.
    let edited = SampleSpec {
        logit_bias: (0..40).map(|t| (t, if t == 10 { 50.0 } else { -0.5 })).collect(),
        token_counts: (30..70).map(|t| (t, 2)).collect(),
        repetition_penalty: 1.5,
        presence_penalty: 0.3,
        forbidden: (60..90).collect(),
        ..spec(1)
    };
    let deep: Vec<f32> = (0..300).map(|i| i as f32 * -50.0).collect();
    let short = [
        case(&row, RowTask::Sample(edited, Some(0))),
        case(&row, RowTask::Sample(SampleSpec { top_p: 0.8, ..spec(2) }, Some(5))),
        case(&deep, RowTask::Score(1, 3)),
    ];
    // More candidates than a list holds.
    let flat: Vec<f32> = rng.units(2100).iter().map(|v| v * 0.02).collect();
    let long = [drawn(&flat, SampleSpec { top_k: 2090, top_p: 0.9, ..spec(3) })];
    let words = |cases: &[Case]| run(&bed.device, &bed.driver, cases).words;
    [words(&short), words(&long)].concat().concat().into_iter().map(f32::from_bits).collect()
}
