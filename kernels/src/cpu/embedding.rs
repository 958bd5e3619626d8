//! Rows of tables, by token, position or segment.

use half::{bf16, f16};

use super::{
    CpuBuffer, CpuWeight,
    pool::{Pool, Shared},
};
use crate::{
    ops::{BatchMeta, Lookup},
    tensor::DType,
};

/// Elements of a task.
const CHUNK: usize = 16_384;

/// `Ops::embedding`.
pub(super) fn run(pool: &Pool, out: &mut CpuBuffer, table: &CpuWeight, meta: &BatchMeta, lookup: Lookup) {
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
            let row = table.row(row(t));
            match lookup {
                Lookup::Tokens { scale } => widen(out, row, table.dtype, |out, x| *out = x * scale),
                Lookup::Positions { .. } | Lookup::Segments => {
                    widen(out, row, table.dtype, |out, x| *out += x);
                }
            }
        }
    });
}

/// Puts every element of a table's row into `out`.
fn widen(out: &mut [f32], row: &[u8], dtype: DType, put: impl Fn(&mut f32, f32)) {
    match dtype {
        DType::Bf16 => {
            for (o, b) in out.iter_mut().zip(row.chunks_exact(2)) {
                put(o, bf16::from_le_bytes([b[0], b[1]]).to_f32());
            }
        }
        DType::F16 => {
            for (o, b) in out.iter_mut().zip(row.chunks_exact(2)) {
                put(o, f16::from_le_bytes([b[0], b[1]]).to_f32());
            }
        }
        _ => {
            for (o, b) in out.iter_mut().zip(row.chunks_exact(4)) {
                put(o, f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            }
        }
    }
}
