//! The parts of a layer.

use tidemill_kernels::ops::HeadShape;

use super::{Change, ExpertsSource, Linear, Maker, Part, Stage, UpDown, source::StackedExperts};
use crate::{
    error::LoadError,
    model::spec::{
        DenseSpec, FusedOrder, Heads, LatentHeads, LayerSpec, MlpSpec, ModelSpec, MoeSpec, QkNorm, QkvNames,
        UpNames,
    },
};

/// Weights of a norm.
pub(crate) struct NormWeights<V> {
    pub weight: V,
    pub bias: Option<V>,
}

/// A decoder layer.
pub(crate) struct Layer<S: Stage> {
    pub before_attention: Option<NormWeights<S::Vector>>,
    pub after_attention: Option<NormWeights<S::Vector>>,
    pub before_mlp: Option<NormWeights<S::Vector>>,
    pub after_mlp: Option<NormWeights<S::Vector>>,
    pub attention: Attention<S>,
    pub o_proj: S::Weight,
    pub mlp: Mlp<S>,
}

/// What attention reads the stream with.
pub(crate) enum Attention<S: Stage> {
    Grouped(GroupedAttention<S>),
    Latent(Latent<S>),
}

/// Queries, keys and values, one matrix `[(Q + 2 K) * D, H]` for all.
pub(crate) struct GroupedAttention<S: Stage> {
    pub qkv_proj: S::Weight,
    /// Norms of queries and of keys.
    pub qk_norm: Option<[S::Vector; 2]>,
    pub sinks: Option<S::Vector>,
}

/// Latent attention in its absorbed form.
pub(crate) struct Latent<S: Stage> {
    /// `[rank, H]` and the norm of what it gives, where queries are compressed.
    pub query_down: Option<(S::Weight, S::Vector)>,
    /// `[Q * nope_dim, rank or H]`.
    pub q_nope: S::Weight,
    /// `[Q * R, rank or H]`.
    pub q_rope: S::Weight,
    /// `[L + R, H]`.
    pub kv_down: S::Weight,
    /// `[L]`.
    pub latent_norm: S::Vector,
    /// For each head `[L, nope_dim]`: what makes a query for latents.
    pub key_heads: S::Experts,
    /// For each head `[value_dim, L]`: what makes a value of a latent.
    pub value_heads: S::Experts,
}

/// A feed-forward block.
pub(crate) enum Mlp<S: Stage> {
    Dense(Dense<S>),
    Moe(Box<Moe<S>>),
}

/// A feed-forward block that is the same for all tokens.
pub(crate) struct Dense<S: Stage> {
    /// `[I, H]`, or `[2 I, H]`: gate and up.
    pub up: S::Weight,
    pub down: S::Weight,
}

/// A mixture of experts.
pub(crate) struct Moe<S: Stage> {
    pub router: S::Weight,
    pub choice_bias: Option<S::Vector>,
    pub experts: UpDown<S::Experts>,
    pub shared: Option<Shared<S>>,
}

/// The expert that every token goes to.
pub(crate) struct Shared<S: Stage> {
    pub dense: Dense<S>,
    pub gate: Option<S::Weight>,
}

impl<S: Stage> Layer<S> {
    /// Takes the parts of layer `index` over.
    pub fn make<M: Maker<Made = S>>(
        maker: &mut M,
        spec: &ModelSpec,
        index: usize,
    ) -> Result<Self, LoadError> {
        let at = Place::new(spec, index);
        let norm = |maker: &mut M, name: Option<&str>| {
            name.map(|name| NormWeights::make(maker, spec, &at.name(name), (spec.hidden_size, 1.0)))
                .transpose()
        };
        let norms = &at.layer.norms;
        let before_attention = norm(maker, norms.before_attention)?;
        let (attention, width) = match spec.heads {
            Heads::Grouped(heads) => {
                (Attention::Grouped(at.grouped(maker, heads)?), heads.num_heads * heads.head_dim)
            }
            Heads::Latent(heads) => {
                (Attention::Latent(at.latent(maker, heads)?), heads.num_heads * heads.value_dim)
            }
        };
        let o_proj = at.part(spec.names.output, [spec.hidden_size, width]);
        Ok(Self {
            before_attention,
            attention,
            o_proj: maker.linear(&Linear::new(vec![o_proj], at.layer.attention.output_bias))?,
            after_attention: norm(maker, norms.after_attention)?,
            before_mlp: norm(maker, norms.before_mlp)?,
            mlp: match &at.layer.mlp {
                MlpSpec::Dense(dense) => Mlp::Dense(at.dense(maker, dense)?),
                MlpSpec::Moe(moe) => Mlp::Moe(Box::new(at.moe(maker, moe)?)),
            },
            after_mlp: norm(maker, norms.after_mlp)?,
        })
    }
}

/// A layer of a specification, and where its tensors are.
struct Place<'a> {
    spec: &'a ModelSpec,
    layer: &'a LayerSpec,
    prefix: String,
}

impl<'a> Place<'a> {
    fn new(spec: &'a ModelSpec, index: usize) -> Self {
        let prefix = spec.tensor_name(&format!("{}.{index}.", spec.names.layers));
        Self { spec, layer: &spec.layers[index], prefix }
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn part(&self, name: &str, shape: [usize; 2]) -> Part {
        Part { is_transposed: self.spec.names.is_transposed, ..Part::all(self.name(name), shape) }
    }

    fn grouped<M: Maker>(
        &self,
        maker: &mut M,
        heads: HeadShape,
    ) -> Result<GroupedAttention<M::Made>, LoadError> {
        let (names, attention, hidden) = (&self.spec.names, &self.layer.attention, self.spec.hidden_size);
        let (q, kv) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        let parts = match names.qkv {
            QkvNames::Separate(each) => {
                each.iter().zip([q, kv, kv]).map(|(name, rows)| self.part(name, [rows, hidden])).collect()
            }
            QkvNames::Fused(name, order) => {
                let mut part = self.part(name, [heads.qkv_width(), hidden]);
                if order == FusedOrder::PerGroup {
                    part.rows = Some(per_group(heads));
                }
                vec![part]
            }
        };
        let change = Change { plus: self.spec.norm.weight_offset, times: 1.0 };
        let qk_norm = match attention.qk_norm {
            None => None,
            Some(kind) => {
                let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
                let shapes = match kind {
                    QkNorm::Head => [vec![head_dim], vec![head_dim]],
                    QkNorm::OwnHead => [vec![num_heads, head_dim], vec![num_kv_heads, head_dim]],
                    QkNorm::Projection => [vec![q], vec![kv]],
                };
                let mut norm = |name: &str, shape: &[usize]| {
                    maker.vector(&self.name(&format!("{name}.weight")), shape, change)
                };
                Some([norm(names.q_norm, &shapes[0])?, norm(names.k_norm, &shapes[1])?])
            }
        };
        Ok(GroupedAttention {
            qkv_proj: maker.linear(&Linear::new(parts, attention.qkv_bias))?,
            qk_norm,
            sinks: match attention.has_sinks {
                true => {
                    Some(maker.vector(&self.name("self_attn.sinks"), &[heads.num_heads], Change::NONE)?)
                }
                false => None,
            },
        })
    }
    fn latent<M: Maker>(&self, maker: &mut M, heads: LatentHeads) -> Result<Latent<M::Made>, LoadError> {
        let hidden = self.spec.hidden_size;
        let LatentHeads { num_heads, nope_dim, rope_dim, latent_dim, value_dim, .. } = heads;
        let bias = self.layer.attention.qkv_bias;
        let norm = |maker: &mut M, name: &str, len| {
            maker.vector(&self.name(&format!("{name}.weight")), &[len], Change::NONE)
        };
        let (query_down, up, width) = match heads.query_rank {
            Some(rank) => {
                let down = Linear::new(vec![self.part("self_attn.q_a_proj", [rank, hidden])], bias);
                let down = (maker.linear(&down)?, norm(maker, "self_attn.q_a_layernorm", rank)?);
                (Some(down), "self_attn.q_b_proj", rank)
            }
            None => (None, "self_attn.q_proj", hidden),
        };
        // Each head's rows: first those without position, then those that carry it.
        let head = nope_dim + rope_dim;
        let mut rows = |first: usize, len: usize| {
            let rows = (0..num_heads).map(|h| h * head + first..h * head + first + len).collect();
            let part = Part { rows: Some(rows), ..self.part(up, [num_heads * head, width]) };
            maker.linear(&Linear::new(vec![part], false))
        };
        let (q_nope, q_rope) = (rows(0, nope_dim)?, rows(nope_dim, rope_dim)?);
        let down = self.part("self_attn.kv_a_proj_with_mqa", [latent_dim + rope_dim, hidden]);
        let kv_down = maker.linear(&Linear::new(vec![down], bias))?;
        let latent_norm = norm(maker, "self_attn.kv_a_layernorm", latent_dim)?;
        let heads = [num_heads, nope_dim, value_dim, latent_dim];
        let [key_heads, value_heads] = maker.absorbed(&self.name("self_attn.kv_b_proj"), heads)?;
        Ok(Latent { query_down, q_nope, q_rope, kv_down, latent_norm, key_heads, value_heads })
    }

    fn dense<M: Maker>(&self, maker: &mut M, dense: &DenseSpec) -> Result<Dense<M::Made>, LoadError> {
        let hidden = self.spec.hidden_size;
        let up = match self.spec.names.up {
            UpNames::Pair(gate, up) => {
                vec![self.part(gate, [dense.width, hidden]), self.part(up, [dense.width, hidden])]
            }
            UpNames::One(up) if dense.is_gated => vec![self.part(up, [2 * dense.width, hidden])],
            UpNames::One(up) => vec![self.part(up, [dense.width, hidden])],
        };
        let down = vec![self.part(self.spec.names.down, [hidden, dense.width])];
        Ok(Dense {
            up: maker.linear(&Linear::new(up, dense.bias))?,
            down: maker.linear(&Linear::new(down, dense.bias))?,
        })
    }

    fn moe<M: Maker>(&self, maker: &mut M, moe: &MoeSpec) -> Result<Moe<M::Made>, LoadError> {
        let (names, hidden, experts) = (&self.spec.names.experts, self.spec.hidden_size, moe.routing.experts);
        let router = Linear::new(vec![self.part(names.router, [experts, hidden])], moe.router_bias);
        let router = maker.linear(&router)?;
        let choice_bias = match moe.choice_bias {
            true => Some(maker.vector(&self.name(names.choice_bias), &[experts], Change::NONE)?),
            false => None,
        };
        let source = match names.is_stacked {
            true => ExpertsSource::Stacked(StackedExperts {
                gate_up: self.name(&format!("{}.{}", names.experts, names.projections[1])),
                down: self.name(&format!("{}.{}", names.experts, names.projections[2])),
                experts,
                hidden,
                width: moe.width,
            }),
            false => {
                let expert = |x: usize| self.gated(&format!("{}.{x}", names.experts), moe.width, moe.bias);
                ExpertsSource::Each((0..experts).map(expert).collect())
            }
        };
        let experts = maker.experts(&source)?;
        let shared = match &moe.shared {
            None => None,
            Some(shared) => {
                let UpDown { up, down } = self.gated(names.shared, shared.dense.width, shared.dense.bias);
                let dense = Dense { up: maker.linear(&up)?, down: maker.linear(&down)? };
                let gate = match shared.has_gate {
                    true => Some(
                        maker.linear(&Linear::new(vec![self.part(names.shared_gate, [1, hidden])], false))?,
                    ),
                    false => None,
                };
                Some(Shared { dense, gate })
            }
        };
        Ok(Moe { router, choice_bias, experts, shared })
    }

    /// The projections of an expert.
    fn gated(&self, prefix: &str, width: usize, bias: bool) -> UpDown<Linear> {
        let hidden = self.spec.hidden_size;
        let [gate, up, down] = self.spec.names.experts.projections;
        let part = |name: &str, shape| self.part(&format!("{prefix}.{name}"), shape);
        UpDown {
            up: Linear::new(vec![part(gate, [width, hidden]), part(up, [width, hidden])], bias),
            down: Linear::new(vec![part(down, [hidden, width])], bias),
        }
    }
}

/// Rows of a matrix that holds, for each key head, the queries that read it, the key and the value: all queries, then all keys, then all
/// values.
fn per_group(heads: HeadShape) -> Vec<std::ops::Range<usize>> {
    let (d, readers) = (heads.head_dim, heads.num_heads / heads.num_kv_heads);
    let group = (readers + 2) * d;
    let parts = [0..readers * d, readers * d..(readers + 1) * d, (readers + 1) * d..group];
    let of_each = |part: &std::ops::Range<usize>| {
        let part = part.clone();
        (0..heads.num_kv_heads).map(move |g| g * group + part.start..g * group + part.end)
    };
    parts.iter().flat_map(of_each).collect()
}
