//! Command-R.

use super::config::{Config, Defaults, Rotation};
use crate::{
    error::LoadError,
    model::spec::{LayerNorms, ModelSpec, NormKind, QkNorm},
};

/// Command-R and R+: parallel blocks behind one layer norm without bias, interleaved rotary positions, scaled logits.
pub(super) fn cohere(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = config.spec(&Defaults {
        eps: "layer_norm_eps",
        eps_value: Some(1e-5),
        norm: NormKind::Layer { bias: false },
        norms: LayerNorms { before_mlp: None, ..LayerNorms::BEFORE },
        tied: true,
        ..Defaults::LLAMA
    })?;
    let (dim, max) = (spec.head_shape().head_dim, spec.max_position_embeddings);
    spec.set_rope(config.rope(&Rotation { is_interleaved: true, ..Rotation::whole(dim, 500_000.0, max) })?);
    let bias = config.flag("attention_bias", false)?;
    spec.set_attention_bias(bias, bias);
    let qk_norm = config.flag("use_qk_norm", false)?.then_some(QkNorm::OwnHead);
    for layer in &mut spec.layers {
        layer.is_parallel = true;
        layer.attention.qk_norm = qk_norm;
    }
    spec.logit_scale = config.positive("logit_scale", 0.0625)? as f32;
    Ok(spec)
}
