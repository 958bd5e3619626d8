//! Mixtures of experts in `config.json`.

use tidemill_kernels::ops::{ExpertScoring, Routing};

use super::config::{Config, MAX_EXTENT};
use crate::{
    error::LoadError,
    model::spec::{DenseSpec, MlpSpec, ModelSpec, MoeSpec},
};

const MAX_EXPERTS: usize = 1 << 16;

impl Config<'_> {
    /// How tokens are routed: a softmax over all experts, of whose results the chosen are taken as they are.
    pub fn routing(
        &self,
        fields: &[&'static str],
        (per_token, absent): (&str, Option<usize>),
    ) -> Result<Routing, LoadError> {
        let mut counts = Vec::new();
        for field in fields {
            counts.extend(self.fields.count(field, MAX_EXPERTS)?);
        }
        let experts = match counts[..] {
            [] => return Err(self.fields.bad(fields[0], "is missing")),
            [first, ref others @ ..] if others.iter().all(|other| *other == first) => first,
            _ => return Err(self.fields.bad(fields[0], format!("contradicts {}", fields[1..].join(", ")))),
        };
        let top_k = self.count(per_token, MAX_EXPERTS, absent)?;
        if top_k > experts {
            return Err(self.fields.bad(per_token, format!("is {top_k}, but there are {experts} experts")));
        }
        Ok(Routing {
            experts,
            top_k,
            scoring: ExpertScoring::Softmax,
            groups: None,
            renormalize: false,
            scale: 1.0,
        })
    }

    /// Puts experts into the layers that `is_moe` names, in place of their dense blocks. `moe` gets the dense block of the layer.
    pub fn set_experts(
        &self,
        spec: &mut ModelSpec,
        is_moe: impl Fn(usize) -> bool,
        moe: impl Fn(DenseSpec) -> MoeSpec,
    ) {
        for (_, layer) in spec.layers.iter_mut().enumerate().filter(|(index, _)| is_moe(*index)) {
            if let MlpSpec::Dense(dense) = layer.mlp {
                layer.mlp = MlpSpec::Moe(moe(dense));
            }
        }
    }

    /// The width of an expert.
    pub fn expert_width(&self, absent: Option<usize>) -> Result<usize, LoadError> {
        self.count("moe_intermediate_size", MAX_EXTENT, absent)
    }

    /// Which layers have experts in Qwen's mixtures: every `decoder_sparse_step`th but those of `mlp_only_layers`.
    pub fn sparse_layers(&self, num_layers: usize) -> Result<Vec<bool>, LoadError> {
        let step = self.count("decoder_sparse_step", MAX_EXTENT, Some(1))?;
        let dense = self.fields.counts("mlp_only_layers")?.unwrap_or_default();
        Ok((0..num_layers).map(|index| !dense.contains(&index) && (index + 1).is_multiple_of(step)).collect())
    }
}

impl MoeSpec {
    /// Experts without biases.
    pub(super) fn plain(routing: Routing, dense: DenseSpec) -> Self {
        Self {
            routing,
            router_bias: false,
            choice_bias: false,
            width: dense.width,
            activation: dense.activation,
            bias: false,
            shared: None,
        }
    }
}
