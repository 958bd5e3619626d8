//! Rows of the tokens whose logits are wanted.

use super::CpuBuffer;

/// `Ops::gather_rows`.
pub(super) fn run(out: &mut CpuBuffer, x: &CpuBuffer, indices: &[u32], width: usize) {
    let out = &mut out.as_mut_slice()[..indices.len() * width];
    for (out, &i) in out.chunks_exact_mut(width.max(1)).zip(indices) {
        out.copy_from_slice(&x.as_slice()[i as usize * width..][..width]);
    }
}
