//! The gate of the feed-forward block.

use super::{
    CpuBuffer,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::{Simd, exp},
};

/// Outputs of one task.
const CHUNK: usize = 8_192;

/// `Ops::silu_mul`.
pub(super) fn run(
    host: Host,
    pool: &Pool,
    out: &mut CpuBuffer,
    gate_up: &CpuBuffer,
    width: usize,
    rows: usize,
) {
    let gate_up = &gate_up.as_slice()[..rows * 2 * width];
    let out = Shared::new(&mut out.as_mut_slice()[..rows * width]);
    let chunk = (CHUNK / width.max(1)).max(1);
    pool.for_each(rows.div_ceil(chunk), rows * width / 3, |task| {
        for r in task * chunk..rows.min((task + 1) * chunk) {
            let (gate, up) = gate_up[r * 2 * width..(r + 1) * 2 * width].split_at(width);
            // SAFETY: row `r` of the output is this task's own.
            let out = unsafe { out.slice(r * width, width) };
            host.run(Row { out, gate, up });
        }
    });
}

struct Row<'a> {
    out: &'a mut [f32],
    gate: &'a [f32],
    up: &'a [f32],
}

impl Job for Row<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Row { out, gate, up } = self;
        let mut at = 0;
        // SAFETY: loads and stores stay below the length of `out`, which is that of `gate` and `up`.
        unsafe {
            while at + S::LANES <= out.len() {
                let y = gated(s, s.load(gate.as_ptr().add(at)), s.load(up.as_ptr().add(at)));
                s.store(out.as_mut_ptr().add(at), y);
                at += S::LANES;
            }
            let n = out.len() - at;
            if n > 0 {
                let y =
                    gated(s, s.load_first(gate.as_ptr().add(at), n), s.load_first(up.as_ptr().add(at), n));
                s.store_first(out.as_mut_ptr().add(at), y, n);
            }
        }
    }
}

/// `g / (1 + e^-g) * u`.
#[inline(always)]
fn gated<S: Simd>(s: S, g: S::F, u: S::F) -> S::F {
    let one = s.splat(1.0);
    s.mul(s.div(g, s.add(one, exp(s, s.sub(s.splat(0.0), g)))), u)
}
