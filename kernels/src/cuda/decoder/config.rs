//! What a device is opened for.

use crate::{
    cuda::{
        driver::Result,
        ops::{PlanKind, PlanShape, check_latent, check_model},
    },
    ops::{HeadShape, LatentShape},
};

/// The attention that all layers of a model have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CudaAttention {
    /// Keys and values of heads: [`crate::Ops::paged_attention`].
    Heads {
        /// Q, K and D.
        heads: HeadShape,
        /// Whether a token sees no later position, in any layer.
        causal: bool,
    },
    /// [`crate::Ops::latent_attention`].
    Latent(LatentShape),
}

impl CudaAttention {
    /// Causal attention over heads.
    pub fn causal(heads: HeadShape) -> Self {
        Self::Heads { heads, causal: true }
    }

    /// Refuses what the kernels cannot take.
    pub(in crate::cuda) fn check(self) -> Result<()> {
        match self {
            Self::Heads { heads, .. } => check_model(heads),
            Self::Latent(shape) => check_latent(shape),
        }
    }

    /// Q, K and D as the cache and the plan have them.
    pub(in crate::cuda) fn heads(self) -> HeadShape {
        match self {
            Self::Heads { heads, .. } => heads,
            Self::Latent(LatentShape { num_heads, latent_dim, rope_dim }) => {
                HeadShape { num_heads, num_kv_heads: 1, head_dim: latent_dim + rope_dim }
            }
        }
    }

    /// Elements of a value.
    pub(in crate::cuda) fn value_dim(self) -> usize {
        match self {
            Self::Heads { heads, .. } => heads.head_dim,
            Self::Latent(shape) => shape.latent_dim,
        }
    }

    /// Whether steps may run from graphs: where tokens see later ones, no step decodes.
    pub(in crate::cuda) fn decodes(self) -> bool {
        !matches!(self, Self::Heads { causal: false, .. })
    }

    /// What its plans are for.
    pub(in crate::cuda) fn plan(self, block_size: usize) -> PlanShape {
        let kind = match self {
            Self::Heads { causal: true, .. } => PlanKind::Causal,
            Self::Heads { causal: false, .. } => PlanKind::BothWays,
            Self::Latent(_) => PlanKind::Latent,
        };
        PlanShape { heads: self.heads(), block_size, window: None, kind }
    }
}

/// The largest step, and what steps have in common.
#[derive(Debug, Clone, Copy)]
pub struct CudaConfig {
    /// T of the largest step.
    pub max_tokens: usize,
    /// S of the largest step.
    pub max_rows: usize,
    /// Longest context in tokens.
    pub max_model_len: usize,
    /// Tokens per KV block: a power of two from 16 to 256.
    pub block_size: usize,
    /// The model's attention.
    pub attention: CudaAttention,
    /// V.
    pub vocab: usize,
    /// Whether decode steps run from CUDA graphs.
    pub graphs: bool,
}

/// Rows of logits in a group at most: a decode step of the largest batch that is usual.
const MAX_LOGITS_ROWS: usize = 256;

impl CudaConfig {
    /// Rows of logits in a group at most.
    pub(in crate::cuda) fn max_logits_rows(&self) -> usize {
        MAX_LOGITS_ROWS.min(self.max_rows.max(self.max_tokens))
    }
}
