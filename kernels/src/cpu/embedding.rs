//! Rows of the embedding table.

use super::{
    CpuBuffer, CpuWeight,
    isa::Host,
    pool::{Pool, Shared},
};

/// `Ops::embedding`.
pub(super) fn run(host: Host, pool: &Pool, out: &mut CpuBuffer, table: &CpuWeight, ids: &[u32]) {
    let h = table.k;
    let out = Shared::new(&mut out.as_mut_slice()[..ids.len() * h]);
    let chunk = (16_384 / h.max(1)).max(1);
    pool.for_each(ids.len().div_ceil(chunk), ids.len() * h / 4, |task| {
        for t in task * chunk..ids.len().min((task + 1) * chunk) {
            // SAFETY: row `t` of the output is this task's own.
            table.row_to_f32(host, ids[t] as usize, unsafe { out.slice(t * h, h) });
        }
    });
}
