//! Additions to the residual stream.

use super::{
    CpuBuffer,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::Simd,
};

/// Elements of a task.
const CHUNK: usize = 16_384;

/// `Ops::add`.
pub(super) fn run(host: Host, pool: &Pool, out: &mut CpuBuffer, x: &CpuBuffer, elems: usize) {
    let x = &x.as_slice()[..elems];
    let out = Shared::new(&mut out.as_mut_slice()[..elems]);
    pool.for_each(elems.div_ceil(CHUNK), elems / 8, |task| {
        let x = &x[task * CHUNK..elems.min((task + 1) * CHUNK)];
        // SAFETY: these outputs are this task's own.
        let out = unsafe { out.slice(task * CHUNK, x.len()) };
        host.run(Scaled { out, x, factor: 1.0 });
    });
}

/// `Ops::add_gated`.
pub(super) fn gated(
    host: Host,
    pool: &Pool,
    out: &mut CpuBuffer,
    x: &CpuBuffer,
    gate: &CpuBuffer,
    [rows, width]: [usize; 2],
) {
    let (x, gate) = (&x.as_slice()[..rows * width], &gate.as_slice()[..rows]);
    let out = Shared::new(&mut out.as_mut_slice()[..rows * width]);
    let chunk = (CHUNK / width.max(1)).max(1);
    pool.for_each(rows.div_ceil(chunk), rows * width / 8, |task| {
        for r in task * chunk..rows.min((task + 1) * chunk) {
            // SAFETY: row `r` of the output is this task's own.
            let out = unsafe { out.slice(r * width, width) };
            let factor = 1.0 / (1.0 + (-gate[r]).exp());
            host.run(Scaled { out, x: &x[r * width..][..width], factor });
        }
    });
}

/// `out += factor * x`.
pub(super) struct Scaled<'a> {
    pub(super) out: &'a mut [f32],
    /// As long as `out`.
    pub(super) x: &'a [f32],
    pub(super) factor: f32,
}

impl Job for Scaled<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let factor = s.splat(self.factor);
        for (out, x) in self.out.chunks_mut(S::LANES).zip(self.x.chunks(S::LANES)) {
            let n = out.len();
            // SAFETY: both chunks hold `n` elements.
            unsafe {
                let y = s.fma(factor, s.load_first(x.as_ptr(), n), s.load_first(out.as_ptr(), n));
                s.store_first(out.as_mut_ptr(), y, n);
            }
        }
    }
}
