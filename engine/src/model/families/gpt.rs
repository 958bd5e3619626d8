//! GPT-2 and GPT-NeoX.

use super::config::{Config, Defaults, Rotation};
use crate::{
    error::LoadError,
    model::spec::{FusedOrder, LayerNorms, ModelSpec, Names, NormKind, PositionSpec, QkvNames, UpNames},
};

/// GPT-2 (Radford et al. 2019): learned positions, and matrices that are stored transposed.
pub(super) fn gpt2(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let names = Names {
        prefix: "transformer.",
        other_prefixes: &["", "transformer."],
        embedding: "wte",
        positions: "wpe",
        layers: "h",
        final_norm: "ln_f",
        qkv: QkvNames::Fused("attn.c_attn", FusedOrder::Stacked),
        output: "attn.c_proj",
        up: UpNames::One("mlp.c_fc"),
        down: "mlp.c_proj",
        is_transposed: true,
        ..Names::LLAMA
    };
    let mut spec = config.spec(&Defaults {
        hidden_size: "n_embd",
        num_layers: "n_layer",
        num_heads: "n_head",
        positions: "n_positions",
        kv_heads: None,
        has_head_dim: false,
        width: ("n_inner", Some(4)),
        activation: ("activation_function", "gelu_new"),
        norms: LayerNorms { before_attention: Some("ln_1"), before_mlp: Some("ln_2"), ..LayerNorms::BEFORE },
        eps: "layer_norm_epsilon",
        names,
        ..LAYER_NORMED
    })?;
    if config.flag("add_cross_attention", false)? {
        return Err(config
            .fields
            .unsupported("add_cross_attention", "is true; there is no encoder to attend to"));
    }
    let is_scaled = config.flag("scale_attn_weights", true)?;
    let by_layer = config.flag("scale_attn_by_inverse_layer_idx", false)?;
    spec.set_attention_bias(true, true);
    spec.set_mlp_bias(true);
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let scale = if is_scaled { layer.attention.scale } else { 1.0 };
        layer.attention.scale = if by_layer { scale / (index + 1) as f32 } else { scale };
    }
    spec.embedding.positions = Some(PositionSpec { rows: spec.max_position_embeddings, offset: 0 });
    Ok(spec)
}

/// GPT-NeoX (Black et al. 2022, arXiv 2204.06745): parallel blocks behind a norm each, partial rotary positions.
pub(super) fn gpt_neox(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let names = Names {
        prefix: "gpt_neox.",
        other_prefixes: &["", "gpt_neox."],
        embedding: "embed_in",
        final_norm: "final_layer_norm",
        head: "embed_out",
        qkv: QkvNames::Fused("attention.query_key_value", FusedOrder::PerGroup),
        output: "attention.dense",
        up: UpNames::One("mlp.dense_h_to_4h"),
        down: "mlp.dense_4h_to_h",
        ..Names::LLAMA
    };
    let mut spec = config.spec(&Defaults {
        kv_heads: None,
        has_head_dim: false,
        activation: ("hidden_act", "gelu"),
        eps: "layer_norm_eps",
        tied: false,
        names,
        ..LAYER_NORMED
    })?;
    let (dim, max) = (spec.head_shape().head_dim, spec.max_position_embeddings);
    let rotation = Rotation { partial: Some(0.25), is_neox: true, ..Rotation::whole(dim, 10_000.0, max) };
    spec.set_rope(config.rope(&rotation)?);
    let bias = config.flag("attention_bias", true)?;
    spec.set_attention_bias(bias, bias);
    spec.set_mlp_bias(true);
    let is_parallel = config.flag("use_parallel_residual", true)?;
    for layer in &mut spec.layers {
        layer.is_parallel = is_parallel;
    }
    Ok(spec)
}

/// Layer norms with biases, and no gate.
pub(super) const LAYER_NORMED: Defaults = Defaults {
    eps_value: Some(1e-5),
    norm: NormKind::Layer { bias: true },
    is_gated: false,
    tied: true,
    ..Defaults::LLAMA
};
