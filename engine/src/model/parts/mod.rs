//! What a model is made of: the one place that says which tensors of a checkpoint become which weights.
//!
//! [`Model::make`] and [`Layer::make`] ask a [`Maker`] for each part. The decoder's maker loads it onto a device; [`list()`] only notes which tensors it
//! takes. So the list of tensors and the loader cannot differ.

mod layer;
mod list;
mod source;

pub(crate) use self::{
    layer::{Attention, Dense, GroupedAttention, Latent, Layer, Mlp, Moe, NormWeights},
    list::list,
    source::{Change, ExpertsSource, Linear, Part, StackedExperts, UpDown},
};
use crate::{
    error::LoadError,
    model::spec::{ModelSpec, NormKind},
};

/// What parts are made of.
pub(crate) trait Stage {
    /// A matrix.
    type Weight;
    /// A vector.
    type Vector;
    /// Matrices, one for each expert or head.
    type Experts;
}

type Weight<M> = <<M as Maker>::Made as Stage>::Weight;
type Vector<M> = <<M as Maker>::Made as Stage>::Vector;
type Experts<M> = <<M as Maker>::Made as Stage>::Experts;

/// Makes parts of a model from tensors of its checkpoint.
pub(crate) trait Maker {
    /// What they are made of.
    type Made: Stage;

    /// A table that tokens look up in.
    fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<Weight<Self>, LoadError>;

    /// A matrix.
    fn linear(&mut self, linear: &Linear) -> Result<Weight<Self>, LoadError>;

    /// A vector, all elements of a tensor; `name` is whole.
    fn vector(&mut self, name: &str, shape: &[usize], change: Change) -> Result<Vector<Self>, LoadError>;

    /// A vector of values that are no tensor.
    fn values(&mut self, values: &[f32]) -> Result<Vector<Self>, LoadError>;

    /// Both halves of a layer's experts.
    fn experts(&mut self, source: &ExpertsSource) -> Result<UpDown<Experts<Self>>, LoadError>;

    /// The two products that latent attention is absorbed into, from the matrix `[Q * (nope_dim + value_dim), L]` that makes keys and values of
    /// latents: for each head `[L, nope_dim]`, the transposed keys' part, and `[value_dim, L]`.
    fn absorbed(&mut self, name: &str, heads: [usize; 4]) -> Result<[Experts<Self>; 2], LoadError>;
}

/// The parts outside of the layers.
pub(crate) struct Model<S: Stage> {
    pub embed_tokens: S::Weight,
    pub positions: Option<S::Weight>,
    pub segments: Option<S::Weight>,
    pub embedding_norm: Option<NormWeights<S::Vector>>,
    pub norm: Option<NormWeights<S::Vector>>,
    /// The same, times the scale of logits.
    pub logits_norm: Option<NormWeights<S::Vector>>,
    /// `None`: tied to `embed_tokens`, or there is none, and nobody wants logits.
    pub lm_head: Option<S::Weight>,
    pub alibi: Option<S::Vector>,
}

impl<S: Stage> Model<S> {
    /// Takes the parts over.
    pub fn make<M: Maker<Made = S>>(maker: &mut M, spec: &ModelSpec) -> Result<Self, LoadError> {
        let (names, hidden) = (&spec.names, spec.hidden_size);
        let mut table = |name: &str, rows: usize| maker.table(&spec.tensor_name(name), [rows, hidden]);
        let embed_tokens = table(names.embedding, spec.vocab_size)?;
        let positions = spec.embedding.positions.map(|p| table(names.positions, p.rows)).transpose()?;
        let segments = spec.embedding.segments.map(|rows| table(names.segments, rows)).transpose()?;
        let mut norm =
            |name: &str, times: f32| NormWeights::make(maker, spec, &spec.tensor_name(name), (hidden, times));
        let embedding_norm = spec.embedding.norm.then(|| norm(names.embedding_norm, 1.0)).transpose()?;
        let is_scaled = spec.final_norm && spec.logit_scale != 1.0 && !spec.is_headless();
        let logits_norm = is_scaled.then(|| norm(names.final_norm, spec.logit_scale)).transpose()?;
        let norm = spec.final_norm.then(|| norm(names.final_norm, 1.0)).transpose()?;
        let lm_head = match spec.has_lm_head() {
            true => Some(maker.linear(&Linear::new(
                vec![Part::all(names.head.to_owned(), [spec.vocab_size, hidden])],
                spec.head_bias,
            ))?),
            false => None,
        };
        let alibi = spec.alibi.as_ref().map(|slopes| maker.values(slopes)).transpose()?;
        Ok(Self { embed_tokens, positions, segments, embedding_norm, norm, logits_norm, lm_head, alibi })
    }
}

impl<V> NormWeights<V> {
    /// The norm `name` over `extent.0` elements, times `extent.1`.
    pub fn make<M: Maker>(
        maker: &mut M,
        spec: &ModelSpec,
        name: &str,
        (len, times): (usize, f32),
    ) -> Result<Self, LoadError>
    where
        M::Made: Stage<Vector = V>,
    {
        let change = Change { plus: spec.norm.weight_offset, times };
        let weight = maker.vector(&format!("{name}.weight"), &[len], change)?;
        let bias = match spec.norm.kind {
            NormKind::Layer { bias: true } => {
                Some(maker.vector(&format!("{name}.bias"), &[len], Change { plus: 0.0, times })?)
            }
            _ => None,
        };
        Ok(Self { weight, bias })
    }
}
