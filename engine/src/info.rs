//! What is loaded and how, for people and clients.

use crate::{ids::TokenId, model::generation_config::GenerationDefaults, pooling::Pooling};

/// A loaded model and the engine around it.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// The name clients use.
    pub served_model_name: String,
    /// As in `config.json`.
    pub architecture: String,
    /// Elements of all tensors.
    pub num_parameters: u64,
    /// Bytes of weights that a decode step reads once for the whole batch.
    pub weight_bytes_per_step: u64,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Tokens of prompt and completion together.
    pub max_model_len: usize,
    /// The device in words.
    pub device: String,
    /// Arithmetic of the matrix products: `bfloat16` or `float32`.
    pub dtype: &'static str,
    /// Storage of keys and values.
    pub kv_cache_dtype: &'static str,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks in all.
    pub num_kv_blocks: usize,
    /// Rows of the batch.
    pub max_num_seqs: usize,
    /// Tokens per step.
    pub max_num_batched_tokens: usize,
    /// Tokens that end a completion.
    pub eos_token_ids: Vec<TokenId>,
    /// Whether chat prompts can be rendered.
    pub has_chat_template: bool,
    /// Sampling defaults of the model.
    pub defaults: GenerationDefaults,
    /// Tokens see those behind them too, as in encoders: a prompt is computed in one step.
    pub is_bidirectional: bool,
    /// What its embeddings are.
    pub embedding: EmbeddingInfo,
    /// How it scores pairs of texts, if it does.
    pub scoring: Option<ScoringInfo>,
}

/// What a model's embeddings are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbeddingInfo {
    /// H: values of an embedding, unless a request asks for fewer.
    pub dimensions: usize,
    /// Which hidden states make it.
    pub pooling: Pooling,
    /// Whether it has length 1, unless a request says otherwise.
    pub normalize: bool,
    /// The model has no output layer: it gives embeddings and nothing else.
    pub is_only_output: bool,
}

/// How a model scores pairs of texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoringInfo {
    /// What a pair is made a prompt by.
    pub format: PairFormat,
    /// It scores and does nothing else: it gives no embeddings and generates nothing.
    pub is_only_output: bool,
}

/// How a query and a document become one prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairFormat {
    /// By the tokenizer's own template for pairs, as cross-encoders read them.
    Pair,
    /// As a question that is answered by yes or no, in the format of the Qwen3 rerankers, with an instruction.
    YesNo,
}

impl PairFormat {
    /// Its name on the wire and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::YesNo => "yes_no",
        }
    }
}
