//! Falcon.

use tidemill_kernels::ops::HeadShape;

use super::{
    config::{Config, Defaults, MAX_HEADS, Rotation},
    gpt::LAYER_NORMED,
};
use crate::{
    error::LoadError,
    model::spec::{FusedOrder, Heads, LayerNorms, ModelSpec, Names, QkvNames, UpNames},
};

/// Falcon (Almazrouei et al. 2023, arXiv 2311.16867) in its three kinds: 7B (one key head, parallel blocks behind one norm), the new architecture of
/// 11B, 40B and 180B (groups of heads, parallel blocks behind one norm or two), and RW (sequential, with linear biases).
pub(super) fn falcon(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let is_new = config.flag("new_decoder_architecture", false)?;
    let is_multi_query = config.flag("multi_query", true)?;
    let order = if is_multi_query && !is_new { FusedOrder::Stacked } else { FusedOrder::PerGroup };
    let names = Names {
        prefix: "transformer.",
        other_prefixes: &["", "transformer."],
        embedding: "word_embeddings",
        layers: "h",
        final_norm: "ln_f",
        qkv: QkvNames::Fused("self_attention.query_key_value", order),
        output: "self_attention.dense",
        up: UpNames::One("mlp.dense_h_to_4h"),
        down: "mlp.dense_4h_to_h",
        ..Names::LLAMA
    };
    let (norms, is_parallel) = norms(config, is_new)?;
    let mut spec = config.spec(&Defaults {
        kv_heads: None,
        has_head_dim: false,
        max_positions: Some(2048),
        activation: ("activation", "gelu"),
        width: ("ffn_hidden_size", Some(4)),
        eps: "layer_norm_epsilon",
        norms,
        names,
        ..LAYER_NORMED
    })?;
    let heads = heads(config, spec.head_shape(), (is_new, is_multi_query))?;
    spec.heads = Heads::Grouped(heads);
    let bias = config.flag("bias", false)?;
    spec.set_attention_bias(bias, bias);
    spec.set_mlp_bias(bias);
    for layer in &mut spec.layers {
        layer.is_parallel = is_parallel;
    }
    if config.flag("alibi", false)? {
        // Saved configurations have rotary positions even so.
        for field in ["rope_parameters", "rope_scaling"] {
            config.fields.get(field);
        }
        // They are added before the scores are scaled.
        let scale = (heads.head_dim as f32).powf(-0.5);
        spec.alibi = Some(alibi_slopes(heads.num_heads).iter().map(|slope| slope * scale).collect());
    } else {
        let rotation = Rotation::whole(heads.head_dim, 10_000.0, spec.max_position_embeddings);
        spec.set_rope(config.rope(&rotation)?);
    }
    Ok(spec)
}

/// The norms of a layer, and whether its blocks are parallel.
fn norms(config: &Config<'_>, is_new: bool) -> Result<(LayerNorms, bool), LoadError> {
    let field = "num_ln_in_parallel_attn";
    let is_parallel = config.flag("parallel_attn", true)?;
    let count = config.fields.count(field, 2)?.unwrap_or(if is_new { 2 } else { 1 });
    if is_new && !is_parallel {
        let detail = "is false, but new_decoder_architecture is true, which is always parallel";
        return Err(config.fields.unsupported("parallel_attn", detail));
    }
    let norms = match (is_new, is_parallel, count) {
        (true, _, 2) => {
            LayerNorms { before_attention: Some("ln_attn"), before_mlp: Some("ln_mlp"), ..LayerNorms::BEFORE }
        }
        (_, true, 1) => LayerNorms { before_mlp: None, ..LayerNorms::BEFORE },
        (_, true, _) => {
            return Err(config
                .fields
                .unsupported(field, "is 2; supported with new_decoder_architecture alone"));
        }
        (_, false, _) => LayerNorms::BEFORE,
    };
    Ok((norms, is_parallel))
}

fn heads(
    config: &Config<'_>,
    all: HeadShape,
    (is_new, is_multi_query): (bool, bool),
) -> Result<HeadShape, LoadError> {
    let given = config.fields.count("num_kv_heads", MAX_HEADS)?;
    let num_kv_heads = match (is_new, is_multi_query) {
        (true, _) => given.unwrap_or(all.num_heads),
        (false, true) => 1,
        (false, false) => all.num_heads,
    };
    if all.num_heads.is_multiple_of(num_kv_heads) {
        return Ok(HeadShape { num_kv_heads, ..all });
    }
    let detail = format!("is {num_kv_heads}, which does not divide num_attention_heads ({})", all.num_heads);
    Err(config.fields.bad("num_kv_heads", detail))
}

/// Slopes of the linear biases (Press et al. 2022, arXiv 2108.12409, section 3), rounded to bfloat16 as the reference does.
fn alibi_slopes(heads: usize) -> Vec<f32> {
    let power = 1_usize << heads.ilog2();
    let series = |count: usize, odd: bool, of: usize| {
        let base = (-8.0 / of as f64).exp2();
        (0..count).map(move |i| base.powi(if odd { 2 * i as i32 + 1 } else { i as i32 + 1 }))
    };
    let slopes = series(power, false, power).chain(series(heads - power, true, 2 * power));
    slopes.map(|slope| to_bf16(slope as f32)).collect()
}

/// To the nearest bfloat16, of two as near to the even one; for finite values.
fn to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}
