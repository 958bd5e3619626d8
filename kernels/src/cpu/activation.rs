//! The functions of feed-forward blocks, and the bound of logits.

use super::{
    CpuBuffer,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::{Simd, exp, tanh},
};
use crate::{
    error::KernelError,
    ops::{Activation, Epilogue, Result},
};

/// Outputs of one task.
const CHUNK: usize = 8_192;

/// A function of one number.
#[derive(Clone, Copy)]
pub(super) enum Function {
    Activation(Activation),
    SoftCap(f32),
}

impl Function {
    /// What an epilogue does to a product, if anything.
    ///
    /// # Errors
    /// For a function of two numbers.
    pub(super) fn of(epilogue: Epilogue) -> Result<Option<Function>> {
        match epilogue {
            Epilogue::Store | Epilogue::Add => Ok(None),
            Epilogue::Activate(Activation::SwigluOai { .. }) => {
                let detail = "SwigluOai takes a gate and a value; use linear_gated".to_owned();
                Err(KernelError::Unsupported { op: "linear", detail })
            }
            Epilogue::Activate(activation) => Ok(Some(Function::Activation(activation))),
            Epilogue::SoftCap(cap) => Ok(Some(Function::SoftCap(cap))),
        }
    }

    /// Replaces every element by its value.
    pub(super) fn apply(self, host: Host, x: &mut [f32]) {
        host.run(Apply { function: self, x });
    }
}

struct Apply<'a> {
    function: Function,
    x: &'a mut [f32],
}

impl Job for Apply<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for chunk in self.x.chunks_mut(S::LANES) {
            // SAFETY: the chunk holds as many elements as it says.
            unsafe {
                let x = s.load_first(chunk.as_ptr(), chunk.len());
                let y = match self.function {
                    Function::Activation(f) => activate(s, f, x),
                    Function::SoftCap(cap) => soft_cap(s, cap, x),
                };
                s.store_first(chunk.as_mut_ptr(), y, chunk.len());
            }
        }
    }
}

/// The gate of [`crate::ops::Ops::linear_gated`] over rows `[rows, 2 * width]`; row `r` goes to row `place(r)` of `out` `[_, width]`, and no
/// two rows to the same.
pub(super) fn gate(
    host: Host,
    pool: &Pool,
    out: &mut CpuBuffer,
    gate_up: &CpuBuffer,
    [rows, width]: [usize; 2],
    activation: Activation,
    place: impl Fn(usize) -> usize + Sync,
) {
    let gate_up = &gate_up.as_slice()[..rows * 2 * width];
    let out = Shared::new(&mut out.as_mut_slice()[..rows * width]);
    let chunk = (CHUNK / width.max(1)).max(1);
    pool.for_each(rows.div_ceil(chunk), rows * width / 3, |task| {
        for r in task * chunk..rows.min((task + 1) * chunk) {
            let (gate, up) = gate_up[r * 2 * width..(r + 1) * 2 * width].split_at(width);
            let to = place(r);
            assert!(to < rows, "row {to} of {rows}");
            // SAFETY: that row of the output is there, and this task's own.
            let out = unsafe { out.slice(to * width, width) };
            host.run(Gate { activation, out, gate, up });
        }
    });
}

struct Gate<'a> {
    activation: Activation,
    out: &'a mut [f32],
    gate: &'a [f32],
    up: &'a [f32],
}

impl Job for Gate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Gate { activation, out, gate, up } = self;
        let mut at = 0;
        // SAFETY: loads and stores stay below the length of `out`, which is that of `gate` and `up`.
        unsafe {
            while at + S::LANES <= out.len() {
                let y = gated(s, activation, s.load(gate.as_ptr().add(at)), s.load(up.as_ptr().add(at)));
                s.store(out.as_mut_ptr().add(at), y);
                at += S::LANES;
            }
            let n = out.len() - at;
            if n > 0 {
                let g = s.load_first(gate.as_ptr().add(at), n);
                let u = s.load_first(up.as_ptr().add(at), n);
                s.store_first(out.as_mut_ptr().add(at), gated(s, activation, g, u), n);
            }
        }
    }
}

// In the functions below a bound stands first so that a NaN passes through.

#[inline(always)]
fn gated<S: Simd>(s: S, f: Activation, gate: S::F, up: S::F) -> S::F {
    if let Activation::SwigluOai { alpha, limit } = f {
        let g = s.min(s.splat(limit), gate);
        let u = s.min(s.splat(limit), s.max(s.splat(-limit), up));
        return s.mul(s.add(u, s.splat(1.0)), times_sigmoid(s, g, s.mul(s.splat(alpha), g)));
    }
    s.mul(activate(s, f, gate), up)
}

#[inline(always)]
fn activate<S: Simd>(s: S, f: Activation, x: S::F) -> S::F {
    match f {
        Activation::Silu => times_sigmoid(s, x, x),
        Activation::Gelu => gelu(s, x),
        Activation::GeluTanh => {
            // (1 + tanh u) / 2 = 1 / (1 + e^-2u), with 2u = 2 sqrt(2 / pi) (x + 0.044715 x³).
            let cubic = s.fma(s.mul(x, x), s.splat(0.071_354_814), s.splat(1.595_769_2));
            times_sigmoid(s, x, s.mul(x, cubic))
        }
        Activation::Relu => s.max(s.splat(0.0), x),
        Activation::SwigluOai { .. } => unreachable!("`Function::of` and `gated` let none through"),
    }
}

/// `x / (1 + e^-y)`.
#[inline(always)]
fn times_sigmoid<S: Simd>(s: S, x: S::F, y: S::F) -> S::F {
    s.div(x, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), y))))
}

/// `x Φ(x) = max(x, 0) - |x| Φ(-|x|)`, where `Φ(-a) = e^(-a²/2) t P(t)` with `t = 1 / (1 + 0.28 a)`: the form of Abramowitz and Stegun, 7.1.26, with
/// a polynomial of degree 8 that was fitted to a relative error of 6e-8 for `a` up to 14.
#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    // Beyond 20 the tail is 0.
    let a = s.min(s.splat(20.0), s.max(s.sub(s.splat(0.0), x), x));
    let t = s.div(s.splat(1.0), s.fma(a, s.splat(0.28), s.splat(1.0)));
    let mut p = s.splat(0.022_791_028);
    for c in [
        -0.083_364_055,
        0.069_778_24,
        0.020_842_254,
        0.053_262_517,
        0.092_077_34,
        0.100_930_63,
        0.111_994_8,
        0.111_687_265,
    ] {
        p = s.fma(p, t, s.splat(c));
    }
    let tail = s.mul(s.mul(t, p), exp(s, s.mul(s.mul(a, a), s.splat(-0.5))));
    s.sub(s.max(s.splat(0.0), x), s.mul(a, tail))
}

/// `cap * tanh(x / cap)`.
#[inline(always)]
pub(super) fn soft_cap<S: Simd>(s: S, cap: f32, x: S::F) -> S::F {
    s.mul(s.splat(cap), tanh(s, s.div(x, s.splat(cap))))
}
