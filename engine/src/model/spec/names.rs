//! What families call their tensors, without `.weight` and `.bias`.

/// Names of a model's tensors. Those of layers stand behind `{prefix}{layers}.{index}.`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// Stands before all names but the output layer's.
    pub prefix: &'static str,
    /// Prefixes that checkpoints of the class have as well.
    pub other_prefixes: &'static [&'static str],
    /// The table of tokens.
    pub embedding: &'static str,
    /// The table of positions.
    pub positions: &'static str,
    /// The table of segments.
    pub segments: &'static str,
    /// The norm of embeddings.
    pub embedding_norm: &'static str,
    /// The layers.
    pub layers: &'static str,
    /// The norm after the last layer.
    pub final_norm: &'static str,
    /// The output layer.
    pub head: &'static str,
    /// Projections of queries, keys and values.
    pub qkv: QkvNames,
    /// The projection of attention's result.
    pub output: &'static str,
    /// The norm of queries.
    pub q_norm: &'static str,
    /// The norm of keys.
    pub k_norm: &'static str,
    /// The projections that the feed-forward block starts with.
    pub up: UpNames,
    /// The projection that it ends with.
    pub down: &'static str,
    /// A mixture of experts.
    pub experts: ExpertNames,
    /// Whether matrices of layers are stored as `[K, N]`.
    pub is_transposed: bool,
}

/// Projections of queries, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkvNames {
    /// One matrix for each.
    Separate([&'static str; 3]),
    /// One matrix for all.
    Fused(&'static str, FusedOrder),
}

/// The order of rows in a fused matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FusedOrder {
    /// All queries, all keys, all values.
    Stacked,
    /// For each key head: the queries that read it, the key, the value.
    PerGroup,
}

/// The projections that a feed-forward block starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpNames {
    /// Gate and up, a matrix for each.
    Pair(&'static str, &'static str),
    /// One matrix: the only one, or gate and then up.
    One(&'static str),
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertNames {
    /// The router.
    pub router: &'static str,
    /// The bias that helps to choose; its whole name.
    pub choice_bias: &'static str,
    /// Stands before `{expert}.` and the names of its projections, or before those of the stacked ones.
    pub experts: &'static str,
    /// Gate, up and down of an expert.
    pub projections: [&'static str; 3],
    /// All experts in one tensor for gate and up, of which rows alternate, and one for down, each with its bias (GPT-OSS).
    pub is_stacked: bool,
    /// Stands before the names of the shared expert's projections.
    pub shared: &'static str,
    /// The gate of the shared expert.
    pub shared_gate: &'static str,
}

impl Names {
    /// Names of Llama, from which most families differ little.
    pub const LLAMA: Self = Self {
        prefix: "model.",
        other_prefixes: &["", "model."],
        embedding: "embed_tokens",
        positions: "",
        segments: "",
        embedding_norm: "",
        layers: "layers",
        final_norm: "norm",
        head: "lm_head",
        qkv: QkvNames::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        output: "self_attn.o_proj",
        q_norm: "self_attn.q_norm",
        k_norm: "self_attn.k_norm",
        up: UpNames::Pair("mlp.gate_proj", "mlp.up_proj"),
        down: "mlp.down_proj",
        experts: ExpertNames {
            router: "mlp.gate",
            choice_bias: "mlp.gate.e_score_correction_bias",
            experts: "mlp.experts",
            projections: ["gate_proj", "up_proj", "down_proj"],
            is_stacked: false,
            shared: "mlp.shared_experts",
            shared_gate: "mlp.shared_expert_gate",
        },
        is_transposed: false,
    };
}
