//! Rows of the embedding table.

use half::{bf16, f16};

use super::{
    CpuBuffer, CpuWeight,
    pool::{Pool, Shared},
};
use crate::tensor::DType;

/// `Ops::embedding`.
pub(super) fn run(pool: &Pool, out: &mut CpuBuffer, table: &CpuWeight, ids: &[u32]) {
    let h = table.k;
    let out = Shared::new(&mut out.as_mut_slice()[..ids.len() * h]);
    let chunk = (16_384 / h.max(1)).max(1);
    pool.for_each(ids.len().div_ceil(chunk), ids.len() * h / 4, |task| {
        for t in task * chunk..ids.len().min((task + 1) * chunk) {
            // SAFETY: row `t` of the output is this task's own.
            widen(unsafe { out.slice(t * h, h) }, table.row(ids[t] as usize), table.dtype);
        }
    });
}

fn widen(out: &mut [f32], row: &[u8], dtype: DType) {
    match dtype {
        DType::Bf16 => {
            for (o, b) in out.iter_mut().zip(row.chunks_exact(2)) {
                *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        DType::F16 => {
            for (o, b) in out.iter_mut().zip(row.chunks_exact(2)) {
                *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        _ => {
            for (o, b) in out.iter_mut().zip(row.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
    }
}
