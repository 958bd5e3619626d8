//! A step: what it computes, and what it gives.

#[allow(unused_imports)] // for links
use super::Ops;
use crate::sampling::Sampled;

/// Marks an entry of [`BatchMeta::token_ids`] that is not a token id: see there.
pub const FEEDBACK: u32 = 1 << 31;

/// What a step computes: flat metadata for T tokens in S rows. No sequence, no request: indices only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BatchMeta {
    /// `[T]` input token ids. `FEEDBACK | r` stands for the id that the previous step sampled for row `r` of its logits
    /// (an index into its `logits_indices`, over all groups in which its logits were computed): the step can be queued before
    /// that id is known to the host. Vocabularies are below 2^31. Where
    /// the row had no finite logits it is any id below V, and nobody reads what comes of it.
    pub token_ids: Vec<u32>,
    /// `[T]` position of each token in its own sequence.
    pub positions: Vec<u32>,
    /// `[T]` slot (`block * block_size + offset`) that receives the token's key and value.
    pub slot_mapping: Vec<u32>,
    /// `[S + 1]` prefix sums of new tokens per row: row `s` owns tokens `cu_seqlens_q[s]..cu_seqlens_q[s + 1]`.
    pub cu_seqlens_q: Vec<u32>,
    /// `[S]` tokens of each row that are in the KV cache once this step has written its own.
    pub context_lens: Vec<u32>,
    /// `[S, max_blocks]` block ids of each row in sequence order; unused entries are 0.
    pub block_tables: Vec<u32>,
    /// Row stride of `block_tables`.
    pub max_blocks: usize,
    /// `[R]` indices into the T tokens whose logits are wanted.
    pub logits_indices: Vec<u32>,
    /// `[E]` indices into the T tokens whose hidden states are wanted on the host, rising; see [`Ops::states`].
    pub state_indices: Vec<u32>,
    /// `[T]` segment of each token (the token types of BERT), or empty: all are 0.
    pub segments: Vec<u32>,
    /// `[S]` adapter of each row: its slot + 1, or 0 for none; or empty: no row has one. See [`Ops::lora_add`].
    pub adapters: Vec<u32>,
}

impl BatchMeta {
    /// T, the number of tokens of the step.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// S, the number of rows (sequences) of the step.
    pub fn num_rows(&self) -> usize {
        self.context_lens.len()
    }
}

/// Extents to compute a step with: the batch's own, or larger where a device pads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// T.
    pub tokens: usize,
    /// R.
    pub logits_rows: usize,
    /// E, never padded.
    pub state_rows: usize,
}

/// What a step gives.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepResults {
    /// One per task, in order.
    pub sampled: Vec<Sampled>,
    /// `[E, H]` what [`Ops::states`] took; empty for a step that wants none.
    pub states: Vec<f32>,
}
