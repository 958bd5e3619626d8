//! Root-mean-square norm.

use super::{
    CpuBuffer,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::Simd,
};

/// `Ops::rmsnorm`.
pub(super) fn run(
    host: Host,
    pool: &Pool,
    out: &mut CpuBuffer,
    x: &CpuBuffer,
    weight: &[f32],
    eps: f32,
    rows: usize,
) {
    let h = weight.len();
    let x = &x.as_slice()[..rows * h];
    let out = Shared::new(&mut out.as_mut_slice()[..rows * h]);
    let chunk = (16_384 / h.max(1)).max(1);
    pool.for_each(rows.div_ceil(chunk), rows * h / 8, |task| {
        for r in task * chunk..rows.min((task + 1) * chunk) {
            // SAFETY: row `r` of the output is this task's own.
            let out = unsafe { out.slice(r * h, h) };
            host.run(Row { out, x: &x[r * h..(r + 1) * h], weight, eps });
        }
    });
}

struct Row<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Job for Row<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Row { out, x, weight, eps } = self;
        let h = x.len();
        let mut sums = [s.splat(0.0); 4];
        let mut at = 0;
        // SAFETY: loads and stores stay below `h`, the length of all three slices.
        unsafe {
            while at + 4 * S::LANES <= h {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let v = s.load(x.as_ptr().add(at + i * S::LANES));
                    *sum = s.fma(v, v, *sum);
                }
                at += 4 * S::LANES;
            }
            while at < h {
                let n = (h - at).min(S::LANES);
                let v = s.load_first(x.as_ptr().add(at), n);
                sums[0] = s.fma(v, v, sums[0]);
                at += n;
            }
            let total = s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
            let scale = s.splat(1.0 / (total / h as f32 + eps).sqrt());
            at = 0;
            while at + S::LANES <= h {
                let v = s.mul(s.load(x.as_ptr().add(at)), scale);
                s.store(out.as_mut_ptr().add(at), s.mul(v, s.load(weight.as_ptr().add(at))));
                at += S::LANES;
            }
            if at < h {
                let v = s.mul(s.load_first(x.as_ptr().add(at), h - at), scale);
                let v = s.mul(v, s.load_first(weight.as_ptr().add(at), h - at));
                s.store_first(out.as_mut_ptr().add(at), v, h - at);
            }
        }
    }
}
