//! OLMo 2.

use super::config::{Config, Defaults};
use crate::{
    error::LoadError,
    model::spec::{AfterNorm, LayerNorms, ModelSpec, QkNorm},
};

/// OLMo 2 (arXiv 2501.00656, section 3): norms after the blocks alone, and of queries and keys as a whole.
pub(super) fn olmo2(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let norms = LayerNorms {
        before_attention: None,
        after_attention: Some("post_attention_layernorm"),
        before_mlp: None,
        after_mlp: Some("post_feedforward_layernorm"),
        after: AfterNorm::Block,
    };
    let mut spec = config.rotary_spec(&Defaults { norms, ..Defaults::LLAMA })?;
    let bias = config.flag("attention_bias", false)?;
    spec.set_attention_bias(bias, bias);
    for layer in &mut spec.layers {
        layer.attention.qk_norm = Some(QkNorm::Projection);
    }
    Ok(spec)
}
