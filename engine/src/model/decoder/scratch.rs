//! Activations, allocated once for the largest step.

use tidemill_kernels::{KernelError, Ops, ops::Routing};

use crate::model::spec::{AfterNorm, Heads, LayerSpec, MlpSpec, ModelSpec};

/// Activations. T is `max_num_batched_tokens`; what the model does not need has one element.
pub(super) struct Scratch<O: Ops> {
    /// `[T, H]` the residual stream.
    pub hidden: O::Buffer,
    /// `[T, H]` normalised input of a block.
    pub normed: O::Buffer,
    /// `[T, H]` normalised input of the second of two parallel blocks.
    pub second_normed: O::Buffer,
    /// `[T, H]` a block's result before it is added.
    pub block: O::Buffer,
    /// `[T, (Q + 2 K) * D]`; in latent attention `[T, Q * nope_dim]`, queries without position.
    pub qkv: O::Buffer,
    /// `[T, Q * D]`; in latent attention `[T, Q * value_dim]`.
    pub attention: O::Buffer,
    /// `[T, 2 I]`, where the device needs it; `[T * k, 2 I]` for experts.
    pub gate_up: O::Buffer,
    /// `[T, I]`, or `[T * k, I]`.
    pub mlp: O::Buffer,
    /// `[T, H]` the rows whose logits or hidden states are wanted.
    pub gathered: O::Buffer,
    /// `[max_logits_rows, V]` in f32.
    pub logits: O::Buffer,
    /// `[T, 2 I]`, where there are adapters.
    pub adapted: Option<O::Buffer>,
    pub latent: Option<LatentScratch<O>>,
    pub moe: Option<MoeScratch<O>>,
}

/// Activations of latent attention.
pub(super) struct LatentScratch<O: Ops> {
    /// `[T, rank]` compressed queries.
    pub query: O::Buffer,
    /// `[T, Q * R]`.
    pub q_rope: O::Buffer,
    /// `[T, Q * L]` queries for latents.
    pub q_latent: O::Buffer,
    /// `[T, L + R]`.
    pub latent: O::Buffer,
    /// `[T, Q * L]` what attention gives.
    pub out: O::Buffer,
}

/// Activations of a mixture of experts.
pub(super) struct MoeScratch<O: Ops> {
    /// `[T, X]` in f32.
    pub logits: O::Buffer,
    pub routes: O::Routes,
    /// `[T * k, H]`.
    pub combine: O::Buffer,
    /// `[T]` in f32.
    pub shared_gate: O::Buffer,
}

/// Widths of what feed-forward blocks need, for one token.
#[derive(Default)]
struct Widths {
    gate_up: usize,
    mlp: usize,
    routing: Option<Routing>,
}

impl<O: Ops> Scratch<O> {
    pub fn new(ops: &O, spec: &ModelSpec, tokens: usize) -> Result<Self, KernelError> {
        let buffer = |elems: usize| ops.buffer((tokens * elems).max(1));
        let (hidden, widths) = (spec.hidden_size, Widths::of(spec));
        let any = |test: fn(&LayerSpec) -> bool, elems: usize| {
            buffer(if spec.layers.iter().any(test) { elems } else { 0 })
        };
        let (qkv, attention) = match spec.heads {
            Heads::Grouped(heads) => (heads.qkv_width(), heads.num_heads * heads.head_dim),
            Heads::Latent(heads) => (heads.num_heads * heads.nope_dim, heads.num_heads * heads.value_dim),
        };
        Ok(Self {
            hidden: buffer(hidden)?,
            normed: buffer(hidden)?,
            second_normed: any(|layer| layer.is_parallel && layer.norms.before_mlp.is_some(), hidden)?,
            block: any(needs_block, hidden)?,
            qkv: buffer(qkv)?,
            attention: buffer(attention)?,
            gate_up: ops.scratch_buffer((tokens * widths.gate_up).max(1))?,
            mlp: buffer(widths.mlp)?,
            gathered: buffer(hidden)?,
            logits: ops.logits_buffer(ops.max_logits_rows() * spec.vocab_size)?,
            adapted: None,
            latent: match spec.heads {
                Heads::Grouped(_) => None,
                Heads::Latent(heads) => Some(LatentScratch {
                    query: buffer(heads.query_rank.unwrap_or(0))?,
                    q_rope: buffer(heads.num_heads * heads.rope_dim)?,
                    q_latent: buffer(heads.num_heads * heads.latent_dim)?,
                    latent: buffer(heads.latent_dim + heads.rope_dim)?,
                    out: buffer(heads.num_heads * heads.latent_dim)?,
                }),
            },
            moe: match &widths.routing {
                None => None,
                Some(routing) => Some(MoeScratch {
                    logits: ops.logits_buffer(tokens * routing.experts)?,
                    routes: ops.routes(tokens, routing)?,
                    combine: buffer(routing.top_k * hidden)?,
                    shared_gate: ops.logits_buffer(tokens)?,
                }),
            },
        })
    }
}

/// Whether a layer has a block whose result is not added at once.
fn needs_block(layer: &LayerSpec) -> bool {
    let norms = &layer.norms;
    let is_normed = norms.after_attention.is_some() || norms.after_mlp.is_some();
    let is_gated =
        matches!(&layer.mlp, MlpSpec::Moe(moe) if moe.shared.is_some_and(|shared| shared.has_gate));
    is_gated || (is_normed && norms.after == AfterNorm::Block)
}

impl Widths {
    fn of(spec: &ModelSpec) -> Self {
        let mut widths = Self::default();
        for layer in &spec.layers {
            match &layer.mlp {
                MlpSpec::Dense(dense) => widths.add(dense.width, dense.is_gated),
                MlpSpec::Moe(moe) => {
                    widths.add(moe.routing.top_k * moe.width, true);
                    widths.routing = Some(moe.routing);
                    if let Some(shared) = &moe.shared {
                        widths.add(shared.dense.width, true);
                    }
                }
            }
        }
        widths
    }

    fn add(&mut self, width: usize, is_gated: bool) {
        self.mlp = self.mlp.max(width);
        if is_gated {
            self.gate_up = self.gate_up.max(2 * width);
        }
    }
}
