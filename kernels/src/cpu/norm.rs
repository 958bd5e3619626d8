//! Norms over rows and over parts of rows.

use super::{
    CpuBuffer,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::Simd,
};
use crate::ops::{Norm, Slices};

/// Elements of a task.
const CHUNK: usize = 16_384;

/// What becomes of the normalised row.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Fate {
    Store,
    Add,
}

/// `Ops::norm` and `Ops::norm_add`.
pub(super) fn run(
    host: Host,
    pool: &Pool,
    out: &mut CpuBuffer,
    x: &CpuBuffer,
    norm: Norm<'_, Vec<f32>>,
    (rows, fate): (usize, Fate),
) {
    let form = Form::new(norm);
    let h = form.weight.len();
    let x = &x.as_slice()[..rows * h];
    let out = Shared::new(&mut out.as_mut_slice()[..rows * h]);
    let chunk = (CHUNK / h.max(1)).max(1);
    pool.for_each(rows.div_ceil(chunk), rows * h / 8, |task| {
        for r in task * chunk..rows.min((task + 1) * chunk) {
            // SAFETY: row `r` of the output is this task's own; that of the input is there, as `x` was cut to size.
            unsafe { form.row(host, out.at(r * h), x.as_ptr().add(r * h), fate) };
        }
    });
}

/// `Ops::norm_slices`.
pub(super) fn slices(host: Host, pool: &Pool, x: &mut CpuBuffer, norm: Norm<'_, Vec<f32>>, slices: Slices) {
    let Slices { rows, stride, offset, groups, width } = slices;
    if rows == 0 {
        return;
    }
    let form = Form::new(norm);
    assert!(form.weight.len() == groups * width, "a norm over {} elements", form.weight.len());
    assert!(offset + groups * width <= stride, "parts that reach into the next row");
    let x = Shared::new(&mut x.as_mut_slice()[..(rows - 1) * stride + offset + groups * width]);
    let chunk = (CHUNK / (groups * width).max(1)).max(1);
    pool.for_each(rows.div_ceil(chunk), rows * groups * width / 8, |task| {
        for r in task * chunk..rows.min((task + 1) * chunk) {
            for g in 0..groups {
                // SAFETY: part `g` of row `r` is this task's own.
                unsafe {
                    let part = x.at(r * stride + offset + g * width);
                    form.part(g * width, width).row(host, part, part, Fate::Store);
                }
            }
        }
    });
}

/// A norm over as many elements as its weight has.
#[derive(Clone, Copy)]
pub(super) struct Form<'a> {
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    /// Whether the mean is subtracted.
    centred: bool,
}

impl<'a> Form<'a> {
    pub(super) fn new(norm: Norm<'a, Vec<f32>>) -> Self {
        match norm {
            Norm::Rms { weight, eps } => Form::rms(weight, eps),
            Norm::Layer { weight, bias, eps } => {
                assert!(bias.is_none_or(|b| b.len() == weight.len()), "a bias of another length");
                Form { weight, bias: bias.map(Vec::as_slice), eps, centred: true }
            }
        }
    }

    pub(super) fn rms(weight: &'a [f32], eps: f32) -> Self {
        Form { weight, bias: None, eps, centred: false }
    }

    /// The norm over fewer elements.
    fn part(self, first: usize, width: usize) -> Self {
        let weight = &self.weight[first..][..width];
        Form { weight, bias: self.bias.map(|b| &b[first..][..width]), ..self }
    }

    pub(super) fn width(&self) -> usize {
        self.weight.len()
    }

    /// Normalises a row.
    ///
    /// # Safety
    /// `x` may be read and `out` written for the norm's width; they are the same or apart, and nobody else touches them.
    pub(super) unsafe fn row(self, host: Host, out: *mut f32, x: *const f32, fate: Fate) {
        host.run(Row { out, x, form: self, fate });
    }
}

/// A row, with the word of [`Form::row`]'s caller.
struct Row<'a> {
    out: *mut f32,
    x: *const f32,
    form: Form<'a>,
    fate: Fate,
}

impl Job for Row<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Row { out, x, form: Form { weight, bias, eps, centred }, fate } = self;
        let h = weight.len();
        let mean = |sum: f32| s.splat(sum / h as f32);
        // The mean in two numbers, so that rows far from zero keep their digits: what is left of it once it was subtracted is small.
        let mut centre = [s.splat(0.0); 2];
        // SAFETY: loads and stores stay below `h`, for which the pointers are valid, and which is the length of weight and bias.
        unsafe {
            if centred {
                centre[0] = mean(reduce::<S, false>(s, x, h, centre));
                centre[1] = mean(reduce::<S, false>(s, x, h, centre));
            }
            let total = reduce::<S, true>(s, x, h, centre);
            let scale = s.splat(1.0 / (total / h as f32 + eps).sqrt());
            let mut at = 0;
            while at < h {
                let n = (h - at).min(S::LANES);
                let v = s.load_first(x.add(at), n);
                let v = if centred { s.sub(s.sub(v, centre[0]), centre[1]) } else { v };
                let mut y = s.mul(s.mul(v, scale), s.load_first(weight.as_ptr().add(at), n));
                if let Some(bias) = bias {
                    y = s.add(y, s.load_first(bias.as_ptr().add(at), n));
                }
                if fate == Fate::Add {
                    y = s.add(s.load_first(out.add(at), n), y);
                }
                s.store_first(out.add(at), y, n);
                at += n;
            }
        }
    }
}

/// Sum of what is left of the elements without the centre, or of its squares, in an order fixed by `h`.
///
/// # Safety
/// `x` is valid for `h` elements.
#[inline(always)]
unsafe fn reduce<S: Simd, const SQUARES: bool>(s: S, x: *const f32, h: usize, centre: [S::F; 2]) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    let mut at = 0;
    // SAFETY: loads stay below `h`.
    unsafe {
        while at + 4 * S::LANES <= h {
            for (i, sum) in sums.iter_mut().enumerate() {
                let v = s.sub(s.sub(s.load(x.add(at + i * S::LANES)), centre[0]), centre[1]);
                *sum = if SQUARES { s.fma(v, v, *sum) } else { s.add(v, *sum) };
            }
            at += 4 * S::LANES;
        }
        while at < h {
            let n = (h - at).min(S::LANES);
            let v = s.sub(s.sub(s.load_first(x.add(at), n), centre[0]), centre[1]);
            let v = s.keep_first(v, n, 0.0);
            sums[0] = if SQUARES { s.fma(v, v, sums[0]) } else { s.add(v, sums[0]) };
            at += n;
        }
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}
