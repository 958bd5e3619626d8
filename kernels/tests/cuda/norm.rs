//! `rmsnorm.cu` and `layernorm.cu` against f64.

use tidemill_kernels::{
    KernelError,
    cuda::{
        Device,
        ops::{Norm, norm, whole_rows},
    },
    ops::{Norm as Form, Slices},
};

use crate::{
    common::{Rng, assert_same},
    harness::{assert_near, bf16s, f32s, on_every_schedule, poisoned, rounded, values},
    words::device,
};

const EPS: f32 = 1e-5;

/// The norms of all slices of `x`.
struct Case {
    x: Vec<f32>,
    slices: Slices,
    weight: Vec<f32>,
    /// Of a layer norm; nothing: a root-mean-square norm.
    layer: Option<Option<Vec<f32>>>,
}

impl Case {
    fn new(seed: u64, slices: Slices, shift: f32) -> Case {
        let mut rng = Rng::new(seed);
        let x = rng.units(slices.rows * slices.stride).iter().map(|v| v + shift).collect::<Vec<_>>();
        Case { x: rounded(&x), slices, weight: rng.units(slices.groups * slices.width), layer: None }
    }

    /// This one as a layer norm, with a bias or without.
    fn layer(self, bias: bool) -> Case {
        let bias = bias.then(|| Rng::new(91).units(self.weight.len()));
        Case { layer: Some(bias), ..self }
    }

    fn run(&self, device: &Device, target: Target) -> Vec<f32> {
        let (weight, x) = (f32s(device, &self.weight), bf16s(device, &self.x));
        let bias = self.layer.iter().flatten().next().map(|bias| f32s(device, bias));
        let form = match self.layer {
            None => Form::Rms { weight: &weight, eps: EPS },
            Some(_) => Form::Layer { weight: &weight, bias: bias.as_ref(), eps: EPS },
        };
        let (mut out, add) = match target {
            Target::Apart => (poisoned(device, self.x.len()), false),
            Target::InPlace => (bf16s(device, &self.x), false),
            Target::Added(old) => (bf16s(device, old), true),
        };
        let x = (!matches!(target, Target::InPlace)).then_some(&x);
        norm(device, Norm { out: &mut out, x, form, slices: self.slices, add }).unwrap();
        values(device, &out)
    }

    /// `values` with every slice replaced by `change(old, norm)`.
    fn expected(&self, values: &[f32], change: impl Fn(f64, f64) -> f64) -> Vec<f64> {
        let Slices { rows, stride, offset, groups, width } = self.slices;
        let mut want: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        for (row, group) in (0..rows).flat_map(|row| (0..groups).map(move |group| (row, group))) {
            let at = row * stride + offset + group * width;
            let x: Vec<f64> = self.x[at..at + width].iter().map(|&v| f64::from(v)).collect();
            let mean = if self.layer.is_some() { x.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let square = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
            for (i, v) in x.iter().enumerate() {
                let k = group * width + i;
                let bias = self.layer.iter().flatten().next().map_or(0.0, |bias| f64::from(bias[k]));
                let y = (v - mean) / (square + f64::from(EPS)).sqrt() * f64::from(self.weight[k]) + bias;
                want[at + i] = change(want[at + i], y);
            }
        }
        want
    }
}

/// Where a norm goes.
#[derive(Clone, Copy)]
enum Target<'a> {
    Apart,
    InPlace,
    Added(&'a [f32]),
}

/// A run for the tests of planted faults.
pub fn sample(device: &Device, layer: bool) -> Vec<f32> {
    let case = Case::new(7, Slices { rows: 2, stride: 1048, offset: 8, groups: 2, width: 512 }, 0.0);
    let case = if layer { case.layer(true) } else { case };
    case.run(device, Target::InPlace)
}

fn both(case: impl Fn() -> Case) -> [Case; 3] {
    [case(), case().layer(false), case().layer(true)]
}

#[test]
fn whole_rows_agree_with_f64_far_from_zero_too_and_stand_alone() {
    on_every_schedule(|device| {
        for (rows, width, shift) in [(1, 8, 0.0), (5, 64, 3.0), (2, 2056, 50.0), (3, 4096, 0.0)] {
            for case in both(|| Case::new(width as u64, whole_rows(rows, width), shift)) {
                let out = case.run(device, Target::Apart);
                assert_near(&out, &case.expected(&case.x, |_, y| y), 0.005, 2e-5, "norm");
                assert_same(&case.run(device, Target::InPlace), &out, "in place");
                let old = rounded(&Rng::new(5).units(rows * width));
                let sum = case.run(device, Target::Added(&old));
                assert_near(&sum, &case.expected(&old, |old, y| old + y), 0.005, 2e-5, "added");
                let x = case.x[..width].to_vec();
                let first = Case { x, slices: whole_rows(1, width), ..case };
                assert_same(&first.run(device, Target::Apart), &out[..width], "first row alone");
                let alone = first.run(device, Target::Added(&old[..width]));
                assert_same(&alone, &sum[..width], "first row alone, added");
            }
        }
    });
}

#[test]
fn parts_of_rows_agree_with_f64_and_what_lies_between_stays() {
    on_every_schedule(|device| {
        for slices in [
            Slices { rows: 3, stride: 40, offset: 8, groups: 2, width: 8 },
            Slices { rows: 2, stride: 576, offset: 0, groups: 1, width: 512 },
            Slices { rows: 4, stride: 5 * 136, offset: 136, groups: 3, width: 136 },
        ] {
            for case in both(|| Case::new(slices.width as u64, slices, 1.0)) {
                let out = case.run(device, Target::InPlace);
                // What no slice covers is exact in f64, so its bound is met by the bits alone.
                assert_near(&out, &case.expected(&case.x, |_, y| y), 0.005, 2e-5, "parts");
                let Slices { stride, offset, groups, width, .. } = slices;
                for (row, before) in out.chunks(stride).zip(case.x.chunks(stride)) {
                    assert_same(&row[..offset], &before[..offset], "before the parts");
                    let end = offset + groups * width;
                    assert_same(&row[end..], &before[end..], "behind the parts");
                }
            }
        }
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let (device, _) = device();
    let call = |slices: Slices, weight: usize, bias: Option<usize>| {
        let (mut out, x) = (poisoned(&device, 48), poisoned(&device, 48));
        let (weight, bias) = (f32s(&device, &vec![1.0; weight]), bias.map(|n| f32s(&device, &vec![0.0; n])));
        let form = Form::Layer { weight: &weight, bias: bias.as_ref(), eps: EPS };
        norm(&device, Norm { out: &mut out, x: Some(&x), form, slices, add: false })
    };
    let fits = Slices { rows: 2, stride: 24, offset: 8, groups: 2, width: 8 };
    assert!(call(fits, 16, Some(16)).is_ok());
    for slices in [
        Slices { width: 4, ..fits },
        Slices { offset: 4, ..fits },
        Slices { stride: 20, ..fits },
        Slices { groups: 3, ..fits },
        Slices { groups: 0, ..fits },
    ] {
        assert!(matches!(call(slices, 48, None), Err(KernelError::Unsupported { op: "norm", .. })));
    }
    assert!(matches!(call(Slices { rows: 3, ..fits }, 16, None), Err(KernelError::Shape { op: "norm", .. })));
    assert!(matches!(call(fits, 8, None), Err(KernelError::Shape { op: "norm", .. })));
    assert!(matches!(call(fits, 16, Some(8)), Err(KernelError::Shape { op: "norm", .. })));
}
