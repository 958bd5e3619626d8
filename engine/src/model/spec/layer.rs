//! What a layer computes.

use tidemill_kernels::ops::{Activation, Routing};

/// A decoder layer: attention and a feed-forward block, each added to the residual stream.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Norms around the blocks.
    pub norms: LayerNorms,
    /// Both blocks read the stream as it was before the layer.
    pub is_parallel: bool,
    /// Attention.
    pub attention: AttentionSpec,
    /// The feed-forward block.
    pub mlp: MlpSpec,
}

/// Names of a layer's norms; where there is none, nothing is normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerNorms {
    /// Of what attention reads.
    pub before_attention: Option<&'static str>,
    /// After attention.
    pub after_attention: Option<&'static str>,
    /// Of what the feed-forward block reads. Absent in a parallel layer: the same as attention.
    pub before_mlp: Option<&'static str>,
    /// After the feed-forward block.
    pub after_mlp: Option<&'static str>,
    /// What the norms after the blocks are applied to.
    pub after: AfterNorm,
}

impl LayerNorms {
    /// Before each block (Xiong et al. 2020), with the names of Llama.
    pub const BEFORE: Self = Self {
        before_attention: Some("input_layernorm"),
        after_attention: None,
        before_mlp: Some("post_attention_layernorm"),
        after_mlp: None,
        after: AfterNorm::Block,
    };
}

/// What the norm after a block is applied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterNorm {
    /// To the block's result, before it is added to the stream.
    Block,
    /// To the stream, after the block's result was added (Vaswani et al. 2017).
    Stream,
}

/// A layer's attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Whether the projections of queries, keys and values have biases. In latent attention: those down to the compressed ones.
    pub qkv_bias: bool,
    /// Whether the projection of the result has a bias.
    pub output_bias: bool,
    /// Norms of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Index into [`ModelSpec::ropes`](super::ModelSpec::ropes); absent in layers without rotary positions.
    pub rope: Option<usize>,
    /// What scores are multiplied with.
    pub scale: f32,
    /// Tokens that a token sees, itself included.
    pub window: Option<usize>,
    /// Bound of the scores.
    pub soft_cap: Option<f32>,
    /// Whether the softmax has a learned term for each head that attends to nothing.
    pub has_sinks: bool,
    /// Whether a token sees no later one.
    pub is_causal: bool,
}

/// Norms of queries and keys, before the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Of each head, with the same weights for all.
    Head,
    /// Of each head, with weights of its own.
    OwnHead,
    /// Of all heads together.
    Projection,
}

/// A feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MlpSpec {
    /// The same for all tokens.
    Dense(DenseSpec),
    /// A mixture of experts.
    Moe(MoeSpec),
}

/// A feed-forward block that is the same for all tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DenseSpec {
    /// I.
    pub width: usize,
    /// Its function.
    pub activation: Activation,
    /// Whether the function gates a second projection.
    pub is_gated: bool,
    /// Whether its projections have biases.
    pub bias: bool,
}

/// A mixture of gated experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeSpec {
    /// Which experts a token goes to.
    pub routing: Routing,
    /// Whether the router has a bias.
    pub router_bias: bool,
    /// Whether a bias that is no part of the weights helps to choose (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    pub choice_bias: bool,
    /// I of one expert.
    pub width: usize,
    /// Their function.
    pub activation: Activation,
    /// Whether their projections have biases.
    pub bias: bool,
    /// The expert that every token goes to.
    pub shared: Option<SharedSpec>,
}

/// The expert that every token goes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedSpec {
    /// The expert.
    pub dense: DenseSpec,
    /// Whether its result is multiplied with the logistic function of a projection of its input.
    pub has_gate: bool,
}
