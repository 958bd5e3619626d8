//! What kind of model a folder holds, as data: `families` reads it from `config.json`, `parts` says which tensors it is made of, and the
//! decoder computes it. A difference between families is a field here.

mod layer;
mod names;

use std::path::Path;

use tidemill_kernels::{
    DType,
    cuda::CudaAttention,
    ops::{HeadShape, KvShape, LatentShape},
};

pub use self::{
    layer::{
        AfterNorm, AttentionSpec, DenseSpec, LayerNorms, LayerSpec, MlpSpec, MoeSpec, QkNorm, SharedSpec,
    },
    names::{ExpertNames, FusedOrder, Names, QkvNames, UpNames},
};
use crate::{
    error::LoadError,
    ids::TokenId,
    model::{
        families,
        files::{CONFIG, ModelFiles},
        parts,
        rope::RopeSpec,
    },
};

/// What comes out of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Logits over the vocabulary: it generates.
    Logits,
    /// Hidden states alone, as in models that were made for embeddings: it generates nothing.
    Hidden,
}

/// Heads of attention, the same in all layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Heads {
    /// Query heads in groups, each group with a key and a value head of its own.
    Grouped(HeadShape),
    /// Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    Latent(LatentHeads),
}

/// Extents of latent attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentHeads {
    /// Q.
    pub num_heads: usize,
    /// Width of the compressed query; `None` where queries are not compressed.
    pub query_rank: Option<usize>,
    /// L: width of the compressed key and value.
    pub latent_dim: usize,
    /// Elements of a head that carry no position.
    pub nope_dim: usize,
    /// R: elements of a head that carry the position.
    pub rope_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Added to the mean square in the norms of compressed queries, keys and values, in f64.
    pub eps: f64,
}

impl LatentHeads {
    /// As the ops want it.
    pub fn shape(&self) -> LatentShape {
        LatentShape { num_heads: self.num_heads, latent_dim: self.latent_dim, rope_dim: self.rope_dim }
    }
}

/// The model's norms, all of one kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// Root mean square, or layer norm.
    pub kind: NormKind,
    /// Added to the mean square or the variance.
    pub eps: f64,
    /// Added to each weight: 1 in Gemma, whose checkpoints hold the difference from 1.
    pub weight_offset: f32,
}

/// Kinds of norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Over the root mean square.
    Rms,
    /// Layer norm.
    Layer {
        /// Whether it has a bias.
        bias: bool,
    },
}

/// What a token becomes before the first layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EmbeddingSpec {
    /// What its row of the table is multiplied with.
    pub scale: f32,
    /// Learned positions that are added.
    pub positions: Option<PositionSpec>,
    /// Rows of the table of segments that are added.
    pub segments: Option<usize>,
    /// Whether the sum is normalised.
    pub norm: bool,
}

/// A table of learned positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PositionSpec {
    /// Rows of the table.
    pub rows: usize,
    /// Rows before that of position 0.
    pub offset: usize,
}

/// A model's shape and constants. Every value has been checked; see [`ModelSpec::from_json`].
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The class name, as in the `architectures` of `config.json`.
    pub architecture: &'static str,
    /// What comes out.
    pub output: Output,
    /// V: tokens of the embedding table. Every token id is below.
    pub vocab_size: usize,
    /// H: width of the residual stream.
    pub hidden_size: usize,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Start-of-sequence token.
    pub bos: Option<TokenId>,
    /// Tokens that end a generation. `generation_config.json` may add more: see
    /// [`GenerationDefaults`](super::GenerationDefaults).
    pub eos: Vec<TokenId>,
    /// The type the weights were saved in. `None` where the file does not say; the checkpoint's tensors do.
    pub dtype: Option<DType>,
    /// Heads of attention.
    pub heads: Heads,
    /// Slopes of linear biases for each query head (ALiBi), in the measure of scaled scores.
    pub alibi: Option<Vec<f32>>,
    /// What a token becomes before the first layer.
    pub embedding: EmbeddingSpec,
    /// The model's norms.
    pub norm: NormSpec,
    /// Rotary position embeddings that layers refer to.
    pub ropes: Vec<RopeSpec>,
    /// Decoder layers.
    pub layers: Vec<LayerSpec>,
    /// Whether there is a norm after the last layer.
    pub final_norm: bool,
    /// Whether the output layer is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether the output layer has a bias.
    pub head_bias: bool,
    /// What logits are multiplied with.
    pub logit_scale: f32,
    /// Bound of the logits.
    pub logit_soft_cap: Option<f32>,
    /// Names of the tensors.
    pub names: Names,
}

/// A tensor that the checkpoint must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the checkpoint: of a plain matrix, or what a quantised one is made of stands in its place.
    pub name: String,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
    /// How it is asked for.
    pub kind: TensorKind,
}

/// How a tensor is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorKind {
    /// By its own name: [`Tensors::tensor`](super::checkpoint::Tensors::tensor).
    Plain,
    /// As a matrix in any format, without the `.weight` of the name: [`Tensors::matrix`](super::checkpoint::Tensors::matrix).
    Matrix,
    /// As the stacked matrices `[X, K, N]` of X experts in any format: [`Tensors::experts`](super::checkpoint::Tensors::experts).
    Experts,
}

impl ModelSpec {
    /// Reads the folder's `config.json`.
    ///
    /// # Errors
    /// As [`ModelSpec::from_json`], and where the file cannot be read.
    pub fn load(files: &ModelFiles) -> Result<Self, LoadError> {
        Self::from_json(&files.path(CONFIG), &files.require(CONFIG)?)
    }

    /// Reads the bytes of a `config.json`; `path` is for messages. Both dialects are understood: `rope_parameters` and
    /// `dtype` of transformers 5, `rope_theta`, `rope_scaling` and `torch_dtype` of earlier ones.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] for a model that Tidemill does not implement, [`LoadError::Format`] for fields that are
    /// missing, of the wrong type, out of range or in contradiction. Both name the field.
    pub fn from_json(path: &Path, bytes: &[u8]) -> Result<Self, LoadError> {
        families::read(path, bytes)
    }

    /// Every tensor that the checkpoint must hold, each once, in the order in which they are loaded.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        parts::list(self)
    }

    /// Follows a checkpoint that names its tensors without the prefix that its class gives them, or with another one that is known:
    /// `contains` tells whether there is such a tensor.
    pub fn follow_names(&mut self, contains: impl Fn(&str) -> bool) {
        let embedding = self.names.embedding;
        let known = std::iter::once(self.names.prefix).chain(self.names.other_prefixes.iter().copied());
        if let Some(prefix) =
            known.into_iter().find(|prefix| contains(&format!("{prefix}{embedding}.weight")))
        {
            self.names.prefix = prefix;
        }
    }

    /// The name in the checkpoint of a tensor that is not the output layer's.
    pub fn tensor_name(&self, name: &str) -> String {
        format!("{}{name}", self.names.prefix)
    }

    /// The name of the embedding table.
    pub fn embedding_name(&self) -> String {
        self.tensor_name(&format!("{}.weight", self.names.embedding))
    }

    /// Whether nothing is generated.
    pub fn is_headless(&self) -> bool {
        self.output == Output::Hidden
    }

    /// Segments that the model tells apart; 0 where it knows none.
    pub fn num_segments(&self) -> usize {
        self.embedding.segments.unwrap_or(0)
    }

    /// Whether tokens see those behind them too: then a prompt is computed in one step.
    pub fn is_bidirectional(&self) -> bool {
        self.layers.iter().any(|layer| !layer.attention.is_causal)
    }

    /// Whether the output layer is a matrix of its own.
    pub fn has_lm_head(&self) -> bool {
        !self.is_headless() && !self.tie_word_embeddings
    }

    /// A KV cache for this model.
    pub fn kv_shape(&self, num_blocks: usize, block_size: usize, dtype: DType) -> KvShape {
        let (num_kv_heads, head_dim, value_dim) = match self.heads {
            Heads::Grouped(heads) => (heads.num_kv_heads, heads.head_dim, heads.head_dim),
            Heads::Latent(heads) => (1, heads.latent_dim + heads.rope_dim, 0),
        };
        let num_layers = self.layers.len();
        KvShape { num_layers, num_blocks, block_size, num_kv_heads, head_dim, value_dim, dtype }
    }

    /// Heads as attention reads them from the cache: in latent attention all query heads read one.
    pub fn head_shape(&self) -> HeadShape {
        match self.heads {
            Heads::Grouped(heads) => heads,
            Heads::Latent(heads) => HeadShape {
                num_heads: heads.num_heads,
                num_kv_heads: 1,
                head_dim: heads.latent_dim + heads.rope_dim,
            },
        }
    }

    /// What a GPU is opened for.
    pub fn cuda_attention(&self) -> CudaAttention {
        match self.heads {
            Heads::Grouped(heads) => {
                let causal = self.layers.iter().all(|layer| layer.attention.is_causal);
                CudaAttention::Heads { heads, causal }
            }
            Heads::Latent(heads) => CudaAttention::Latent(heads.shape()),
        }
    }
}
