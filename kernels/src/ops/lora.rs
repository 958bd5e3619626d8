//! Low-rank adapters: `W x` becomes `W x + scale * B (A x)` for the tokens of a row that has one (Hu et al. 2021, LoRA, section 4.1).
//!
//! Rows of several adapters and of none share a step, as in Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023): the tokens of one adapter
//! are computed together, whichever rows they belong to.

use super::{BatchMeta, Result};
use crate::{
    error::KernelError,
    tensor::{DType, HostTensor},
};

/// Room for the adapters of one matrix `[N, K]` that stacks parts along N.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraShape {
    /// Adapters at a time.
    pub slots: usize,
    /// The highest rank.
    pub max_rank: usize,
    /// K.
    pub k: usize,
    /// Rows of each part; N is their sum.
    pub parts: Vec<usize>,
}

/// An adapter of one part.
#[derive(Debug, Clone)]
pub struct LoraPart {
    /// `[r, K]` bf16, f16 or f32; r is at least 1.
    pub a: HostTensor,
    /// `[N_i, r]`.
    pub b: HostTensor,
    /// What the product is multiplied with.
    pub scale: f32,
}

impl LoraPart {
    /// r.
    pub fn rank(&self) -> usize {
        self.a.shape.first().copied().unwrap_or(0)
    }

    /// `[r, N_i]`: B so that the elements of neighbouring outputs are neighbours.
    pub(crate) fn transposed_b(&self) -> HostTensor {
        let (rank, size) = (self.rank(), self.b.dtype.size());
        let rows = self.b.data.len() / (rank * size).max(1);
        let mut data = Vec::with_capacity(self.b.data.len());
        for j in 0..rank {
            for n in 0..rows {
                data.extend_from_slice(&self.b.data[(n * rank + j) * size..][..size]);
            }
        }
        HostTensor { shape: vec![rank, rows], data: data.into(), ..self.b.clone() }
    }
}

impl LoraShape {
    /// N.
    pub fn n(&self) -> usize {
        self.parts.iter().sum()
    }

    /// The caller's side of [`Ops::set_lora`](super::Ops::set_lora).
    pub(crate) fn check(&self, slot: usize, parts: &[Option<LoraPart>]) -> Result<()> {
        let shape = |what: &str, got: &[usize], expected: Vec<usize>| KernelError::Shape {
            op: "set_lora",
            what: what.to_owned(),
            got: got.to_vec(),
            expected,
        };
        if slot >= self.slots {
            return Err(shape("slot", &[slot], vec![self.slots]));
        }
        if parts.len() != self.parts.len() {
            return Err(shape("parts", &[parts.len()], vec![self.parts.len()]));
        }
        for (part, &n) in parts.iter().zip(&self.parts) {
            let Some(part) = part else { continue };
            let rank = part.rank();
            if !(1..=self.max_rank).contains(&rank) {
                return Err(shape(&part.a.name, &part.a.shape, vec![self.max_rank, self.k]));
            }
            for (tensor, expected) in [(&part.a, [rank, self.k]), (&part.b, [n, rank])] {
                let bytes = expected.iter().product::<usize>() * tensor.dtype.size();
                if tensor.shape != expected || tensor.data.len() != bytes {
                    return Err(shape(&tensor.name, &tensor.shape, expected.to_vec()));
                }
                if tensor.dtype == DType::F8E4M3 {
                    let detail = format!("{} is {:?}; convert the adapter", tensor.name, tensor.dtype);
                    return Err(KernelError::Unsupported { op: "set_lora", detail });
                }
            }
        }
        Ok(())
    }
}

/// The tokens of a step that have the same adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LoraGroup {
    pub slot: usize,
    /// Rising.
    pub tokens: Vec<u32>,
}

impl LoraGroup {
    /// One for each adapter of a step, by slot.
    pub fn of(meta: &BatchMeta) -> Vec<LoraGroup> {
        let mut groups: Vec<LoraGroup> = Vec::new();
        for (row, &adapter) in meta.adapters.iter().enumerate().filter(|(_, adapter)| **adapter > 0) {
            let slot = adapter as usize - 1;
            let at = groups.binary_search_by_key(&slot, |group| group.slot).unwrap_or_else(|at| {
                groups.insert(at, LoraGroup { slot, tokens: Vec::new() });
                at
            });
            groups[at].tokens.extend(meta.cu_seqlens_q[row]..meta.cu_seqlens_q[row + 1]);
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_one_adapter_are_together_whichever_rows_they_belong_to() {
        let meta = BatchMeta {
            cu_seqlens_q: vec![0, 2, 3, 6, 7],
            adapters: vec![3, 0, 1, 3],
            ..BatchMeta::default()
        };
        let groups = LoraGroup::of(&meta);
        let group = |slot, tokens: &[u32]| LoraGroup { slot, tokens: tokens.to_vec() };
        assert_eq!(groups, [group(0, &[3, 4, 5]), group(2, &[0, 1, 6])]);
        assert_eq!(LoraGroup::of(&BatchMeta { adapters: vec![], ..meta }), []);
    }
}
