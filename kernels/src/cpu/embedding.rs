//! Rows of tables, by token, position or segment.

use super::{
    CpuBuffer, CpuWeight,
    isa::Host,
    pool::{Pool, Shared},
};
use crate::ops::{BatchMeta, Lookup};

/// Elements of a task.
const CHUNK: usize = 16_384;

/// `Ops::embedding`.
pub(super) fn run(
    host: Host,
    pool: &Pool,
    out: &mut CpuBuffer,
    table: &CpuWeight,
    meta: &BatchMeta,
    lookup: Lookup,
) {
    let (tokens, h) = (meta.num_tokens(), table.k);
    let out = Shared::new(&mut out.as_mut_slice()[..tokens * h]);
    let row = |t: usize| match lookup {
        Lookup::Tokens { .. } => meta.token_ids[t] as usize,
        Lookup::Positions { offset } => meta.positions[t] as usize + offset,
        // A step that names no segments has one.
        Lookup::Segments => meta.segments.get(t).map_or(0, |&segment| segment as usize),
    };
    let chunk = (CHUNK / h.max(1)).max(1);
    pool.for_each(tokens.div_ceil(chunk), tokens * h / 4, |task| {
        for t in task * chunk..tokens.min((task + 1) * chunk) {
            // SAFETY: row `t` of the output is this task's own.
            let out = unsafe { out.slice(t * h, h) };
            match lookup {
                Lookup::Tokens { scale } => table.widen_row(host, row(t), out, |out, x| *out = x * scale),
                Lookup::Positions { .. } | Lookup::Segments => {
                    table.widen_row(host, row(t), out, |out, x| *out += x);
                }
            }
        }
    });
}
