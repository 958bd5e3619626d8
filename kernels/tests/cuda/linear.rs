//! `linear_skinny.cu` and `linear_tiled.cu` against f64, and against each other to the bit.

use std::sync::Arc;

use tidemill_kernels::{
    DType, KernelError,
    cuda::{
        Device,
        memory::DeviceBuffer,
        ops::{ActivationKind, Linear, LinearEpilogue, LinearKernel, linear, linear_with},
    },
};
use tidemill_kernels_emu::EmuDriver;

use crate::{
    activation::{OAI, exact, exact_up},
    common::{Rng, assert_same},
    harness::{bf16s, f32s, on_every_schedule, poisoned, rounded, values},
    words,
};

use ActivationKind::{Gelu, GeluTanh, Relu, Silu};
use LinearEpilogue::{Activate, Add, Gated, SoftCap, Store};

/// A product and its operands; weights are small enough that activations see arguments of a few units.
struct Problem {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    bias_dtype: DType,
    residual: Vec<f32>,
    n: usize,
    k: usize,
    epilogue: LinearEpilogue,
    out: DType,
}

impl Problem {
    fn new(rows: usize, n: usize, k: usize, epilogue: LinearEpilogue, out: DType) -> Problem {
        let mut rng = Rng::new((n * 1000 + k) as u64);
        let weight_rows = if matches!(epilogue, Gated(_)) { 2 * n } else { n };
        let scale = 3.0 / (k as f32).sqrt();
        let weight: Vec<f32> = rng.units(weight_rows * k).iter().map(|w| w * scale).collect();
        Problem {
            x: rounded(&rng.units(rows * k)),
            weight: rounded(&weight),
            bias: None,
            bias_dtype: DType::F32,
            residual: rounded(&rng.units(rows * n)),
            n,
            k,
            epilogue,
            out,
        }
    }

    fn with_bias(mut self, dtype: DType) -> Problem {
        let bias = Rng::new(5).units(self.weight.len() / self.k);
        self.bias = Some(if dtype == DType::Bf16 { rounded(&bias) } else { bias });
        self.bias_dtype = dtype;
        self
    }

    fn out(&self, device: &Device, rows: usize) -> DeviceBuffer {
        match (self.epilogue, self.out) {
            (Add, _) => bf16s(device, &self.residual[..rows * self.n]),
            (_, DType::Bf16) => poisoned(device, rows * self.n),
            _ => f32s(device, &vec![f32::NAN; rows * self.n]),
        }
    }

    /// Computes rows `first..first + rows` by themselves.
    fn run(&self, device: &Device, kernel: Option<LinearKernel>, first: usize, rows: usize) -> Vec<f32> {
        let mut out = self.out(device, rows);
        let x = bf16s(device, &self.x[first * self.k..][..rows * self.k]);
        let weight = bf16s(device, &self.weight);
        let bias = self.bias.as_ref().map(|bias| match self.bias_dtype {
            DType::Bf16 => bf16s(device, bias),
            _ => f32s(device, bias),
        });
        let (n, k, epilogue) = (self.n, self.k, self.epilogue);
        let call =
            Linear { out: &mut out, x: &x, weight: &weight, bias: bias.as_ref(), rows, n, k, epilogue };
        match kernel {
            Some(kernel) => linear_with(device, kernel, call).unwrap(),
            None => linear(device, call).unwrap(),
        }
        values(device, &out)
    }

    /// `x · weightᵀ + bias` of one output, and a bound on the error of f32 sums in any order: K roundings of the sum of magnitudes.
    fn product(&self, r: usize, n: usize) -> (f64, f64) {
        let (x, w) = (&self.x[r * self.k..][..self.k], &self.weight[n * self.k..][..self.k]);
        let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[n]));
        let (mut sum, mut magnitude) = (bias, bias.abs());
        for term in terms {
            sum += term;
            magnitude += term.abs();
        }
        (sum, (self.k + 8) as f64 * 2_f64.powi(-24) * magnitude)
    }

    /// The value of one output before rounding, and its bound. The activations' slopes are below 1.2, their own errors below 4e-6.
    fn value(&self, r: usize, n: usize) -> (f64, f64) {
        let (v, error) = self.product(r, n);
        match self.epilogue {
            Store => (v, error),
            Add => {
                let sum = v + f64::from(self.residual[r * self.n + n]);
                (sum, error + 2_f64.powi(-24) * sum.abs())
            }
            Activate(kind) => (exact(kind, v), 1.2 * error + 4e-6),
            Gated(kind) => {
                let (up, up_error) = self.product(r, self.n + n);
                let (gate, up) = (exact(kind, v), exact_up(kind, up));
                (gate * up, (1.2 * error + 4e-6) * up.abs() + up_error * gate.abs() + 1e-6)
            }
            SoftCap(cap) => {
                let cap = f64::from(cap);
                (cap * (v / cap).tanh(), error + 1e-6 * cap)
            }
        }
    }

    #[track_caller]
    fn assert_near(&self, got: &[f32], what: &str) {
        // Half a unit in the last place of bf16's 8 bits.
        let rounding = if self.out == DType::Bf16 { 2_f64.powi(-8) } else { 2_f64.powi(-24) };
        for (i, &got) in got.iter().enumerate() {
            let (want, error) = self.value(i / self.n, i % self.n);
            let bound = error + rounding * (want.abs() + error);
            let off = (f64::from(got) - want).abs();
            assert!(off <= bound, "{what}: element {i} is {got}, expected {want} within {bound}");
        }
    }
}

/// Every kernel, for the tests of planted faults.
pub fn sample(device: &Device) -> Vec<f32> {
    let problem = Problem::new(34, 72, 328, Store, DType::Bf16);
    LinearKernel::ALL.into_iter().flat_map(|kernel| problem.run(device, Some(kernel), 0, 34)).collect()
}

#[test]
fn every_kernel_agrees_with_f64_on_every_schedule() {
    on_every_schedule(|device| {
        for kernel in LinearKernel::ALL {
            // One token beyond a tile, a last row tile that is not full, a K that ends inside a block.
            let rows = kernel.tokens() + 1;
            let problem = Problem::new(rows, 72, 296, Store, DType::Bf16);
            problem.assert_near(&problem.run(device, Some(kernel), 0, rows), &format!("{kernel:?}"));
        }
    });
}

#[test]
fn a_row_has_the_same_bits_in_every_kernel_and_any_number_of_rows() {
    let (device, _) = words::device();
    for (n, k) in [(8, 8), (200, 8), (16, 40), (40, 64), (72, 256), (8, 520), (200, 520)] {
        // f32 shows every bit of the sum.
        let problem = Problem::new(130, n, k, Store, DType::F32).with_bias(DType::F32);
        let all = problem.run(&device, None, 0, 130);
        problem.assert_near(&all, "all rows");
        for kernel in LinearKernel::ALL {
            for rows in [1, 2, 7, 8, 9, 16, 33, 64, 65, 130] {
                let some = problem.run(&device, Some(kernel), 0, rows);
                assert_same(&some, &all[..rows * n], &format!("{kernel:?}, {rows} rows of {n} x {k}"));
            }
        }
        for first in [1, 63, 129] {
            let alone = problem.run(&device, None, first, 1);
            assert_same(&alone, &all[first * n..][..n], "a row alone");
        }
    }
}

#[test]
fn every_epilogue_agrees_with_f64_and_has_the_same_bits_in_every_kernel() {
    let (device, _) = words::device();
    let epilogues = [
        (Store, DType::Bf16),
        (Add, DType::Bf16),
        (Activate(Silu), DType::Bf16),
        (Activate(Gelu), DType::F32),
        (Activate(GeluTanh), DType::Bf16),
        (Activate(Relu), DType::F32),
        (Gated(Silu), DType::Bf16),
        (Gated(Silu), DType::F32),
        (Gated(Relu), DType::Bf16),
        (Gated(OAI), DType::F32),
        (Gated(Gelu), DType::Bf16),
        (Gated(GeluTanh), DType::Bf16),
        (SoftCap(2.0), DType::F32),
    ];
    for (epilogue, out) in epilogues {
        // 13 outputs: rows that begin at no multiple of 16 bytes, half a tile of gates.
        for (n, bias) in [(13, None), (72, Some(DType::F32)), (24, Some(DType::Bf16))] {
            let mut problem = Problem::new(18, n, 72, epilogue, out);
            if let Some(dtype) = bias {
                problem = problem.with_bias(dtype);
            }
            let what = format!("{epilogue:?} to {out:?}, {n} outputs, bias {bias:?}");
            let first = problem.run(&device, None, 0, 18);
            problem.assert_near(&first, &what);
            for kernel in LinearKernel::ALL {
                let again = problem.run(&device, Some(kernel), 0, 18);
                assert_same(&again, &first, &format!("{what}, {kernel:?}"));
            }
        }
    }
}

#[test]
fn every_tile_is_computed_where_token_tiles_come_in_several_groups() {
    let (device, _) = words::device();
    let problem = Problem::new(16 * 64 + 130, 136, 8, Store, DType::F32);
    let rows = 16 * 64 + 130;
    for kernel in [LinearKernel::Tiled128x64, LinearKernel::Tiled128x128, LinearKernel::Skinny32x64] {
        problem.assert_near(&problem.run(&device, Some(kernel), 0, rows), &format!("{kernel:?}"));
    }
}

#[test]
fn a_row_of_nan_stays_in_its_row() {
    let (device, _) = words::device();
    let problem = Problem::new(20, 40, 72, Store, DType::F32);
    let clean = problem.run(&device, None, 0, 20);
    let mut sick = Problem::new(20, 40, 72, Store, DType::F32);
    sick.x[3 * 72..][..72].fill(f32::NAN);
    for kernel in LinearKernel::ALL {
        let got = sick.run(&device, Some(kernel), 0, 20);
        assert!(got[3 * 40..4 * 40].iter().all(|v| v.is_nan()));
        assert_same(&got[..3 * 40], &clean[..3 * 40], "rows before");
        assert_same(&got[4 * 40..], &clean[4 * 40..], "rows after");
    }
}

#[test]
fn shared_memory_meets_no_bank_conflict() {
    // Only the emulator counts them.
    let emulator = Arc::new(EmuDriver::new(Default::default()));
    let device = Device::new(emulator.clone());
    for epilogue in [Store, Gated(Silu)] {
        let problem = Problem::new(130, 136, 296, epilogue, DType::Bf16);
        for kernel in LinearKernel::ALL {
            problem.run(&device, Some(kernel), 0, 130);
            let stats = emulator.last_stats();
            assert!(stats.shared_phases > 0);
            assert_eq!(stats.shared_conflicts, 0, "{kernel:?} with {epilogue:?}");
        }
    }
}

#[test]
fn the_kernel_reads_weights_once_for_few_rows_and_fills_the_device_for_many() {
    const SMS: u32 = 132;
    for tile_rows in [16, 4096, 28672] {
        for rows in 1..=64 {
            assert!(LinearKernel::choose(rows, tile_rows, SMS).tokens() >= rows);
        }
    }
    for (rows, tile_rows, kernel) in [
        (1, 4096, LinearKernel::Skinny16x8),
        (16, 1024, LinearKernel::Skinny16x16),
        (16, 28672, LinearKernel::Skinny32x16),
        (64, 4096, LinearKernel::Skinny32x64),
        (64, 28672, LinearKernel::Skinny64x64),
        (128, 4096, LinearKernel::Skinny64x64),
        (256, 4096, LinearKernel::Tiled128x64),
        (300, 256, LinearKernel::Tiled128x64),
        (2048, 4096, LinearKernel::Tiled128x128),
    ] {
        assert_eq!(LinearKernel::choose(rows, tile_rows, SMS), kernel);
    }
}

#[test]
fn no_rows_are_no_launch_and_bad_calls_are_refused() {
    let (device, _) = words::device();
    let (x, weight) = (bf16s(&device, &[0.0; 16]), bf16s(&device, &[0.0; 64]));
    let call = |rows, n, k, epilogue, out: &mut DeviceBuffer| {
        linear(&device, Linear { out, x: &x, weight: &weight, bias: None, rows, n, k, epilogue })
    };
    let (mut bf16, mut f32) = (poisoned(&device, 16), f32s(&device, &[0.0; 16]));
    call(0, 8, 8, Store, &mut bf16).unwrap();
    call(2, 8, 8, Store, &mut bf16).unwrap();
    let unsupported = |result| assert!(matches!(result, Err(KernelError::Unsupported { op: "linear", .. })));
    unsupported(call(1, 8, 4, Store, &mut bf16));
    unsupported(call(1, 0, 8, Store, &mut bf16));
    unsupported(call(1, 8, 8, Add, &mut f32));
    unsupported(call(1, 8, 8, SoftCap(0.0), &mut f32));
    unsupported(call(1, 1 << 21, 8, Store, &mut bf16));
    let shape = |result| assert!(matches!(result, Err(KernelError::Shape { op: "linear", .. })));
    shape(call(3, 8, 8, Store, &mut bf16));
    shape(call(2, 9, 8, Store, &mut bf16));
    shape(call(1, 8, 8, Gated(Silu), &mut bf16));
}
