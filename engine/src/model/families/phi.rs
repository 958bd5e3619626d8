//! Phi-3 and Phi-4.

use super::config::{Config, Defaults, Rotation};
use crate::{
    error::LoadError,
    model::spec::{FusedOrder, ModelSpec, Names, QkvNames, UpNames},
};

/// Phi-3 and Phi-4 (Abdin et al. 2024, arXiv 2404.14219): fused projections, partial rotary positions, LongRoPE.
pub(super) fn phi3(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let names = Names {
        qkv: QkvNames::Fused("self_attn.qkv_proj", FusedOrder::Stacked),
        up: UpNames::One("mlp.gate_up_proj"),
        ..Names::LLAMA
    };
    let mut spec = config.spec(&Defaults { names, ..Defaults::LLAMA })?;
    let (dim, max) = (spec.head_shape().head_dim, spec.max_position_embeddings);
    let rotation = Rotation { partial: Some(1.0), is_phi: true, ..Rotation::whole(dim, 10_000.0, max) };
    spec.set_rope(config.rope(&rotation)?);
    config.set_window_everywhere(&mut spec, None)?;
    Ok(spec)
}
