//! Rows of the tokens whose logits or hidden states are wanted.

use super::CpuBuffer;

/// `Ops::gather_rows`.
pub(super) fn run(out: &mut CpuBuffer, x: &CpuBuffer, indices: impl Iterator<Item = u32>, width: usize) {
    for (out, i) in out.as_mut_slice().chunks_exact_mut(width.max(1)).zip(indices) {
        out.copy_from_slice(&x.as_slice()[i as usize * width..][..width]);
    }
}
