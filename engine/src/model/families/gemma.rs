//! Gemma 1, 2 and 3.

use super::config::{Config, Defaults, MAX_EXTENT, Rotation};
use crate::{
    error::LoadError,
    model::{
        rope::{RopeScaling, RopeSpec},
        spec::{AfterNorm, LayerNorms, ModelSpec, Names, QkNorm},
    },
};

/// Gemma 1's; norms before and after each block are those of Gemma 2 and 3.
const GEMMA: Defaults = Defaults {
    head_dim: Some(256),
    eps_value: Some(1e-6),
    activation: ("hidden_act", "gelu_pytorch_tanh"),
    tied: true,
    ..Defaults::LLAMA
};

const SANDWICH: Defaults = Defaults {
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    norms: LayerNorms {
        before_attention: Some("input_layernorm"),
        after_attention: Some("post_attention_layernorm"),
        before_mlp: Some("pre_feedforward_layernorm"),
        after_mlp: Some("post_feedforward_layernorm"),
        after: AfterNorm::Block,
    },
    ..GEMMA
};

/// Gemma (arXiv 2403.08295). `gelu` in its files means the approximation by tanh.
pub(super) fn gemma1(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut defaults = GEMMA;
    if config.fields.string("hidden_act")? == Some("gelu") {
        defaults.activation = ("hidden_activation", "gelu_pytorch_tanh");
    }
    let mut spec = config.spec(&defaults)?;
    let dim = spec.head_shape().head_dim;
    spec.set_rope(config.rope(&Rotation::whole(dim, defaults.theta, spec.max_position_embeddings))?);
    common(config, &mut spec)?;
    Ok(spec)
}

/// Gemma 2 (arXiv 2408.00118): windows in every other layer, bounded scores and logits, norms around blocks.
pub(super) fn gemma2(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = config.rotary_spec(&SANDWICH)?;
    common(config, &mut spec)?;
    scores(config, &mut spec, [Some(50.0), Some(30.0)])?;
    let layers = spec.layers.len();
    let sliding =
        config.sliding_layers(layers)?.unwrap_or_else(|| (0..layers).map(|i| i.is_multiple_of(2)).collect());
    config.set_windows(&mut spec, &sliding, Some(4096))?;
    Ok(spec)
}

/// Gemma 3 (arXiv 2503.19786): norms of queries and keys, and rotary positions of their own for layers with a window.
pub(super) fn gemma3(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let defaults = Defaults {
        vocab_size: Some(262_208),
        heads: Some(8),
        kv_heads: Some(("num_key_value_heads", Some(4))),
        max_positions: Some(131_072),
        ..SANDWICH
    };
    let mut spec = config.spec(&defaults)?;
    common(config, &mut spec)?;
    scores(config, &mut spec, [None, None])?;
    let layers = spec.layers.len();
    let period = config.count("sliding_window_pattern", MAX_EXTENT, Some(6))?;
    let sliding = config
        .sliding_layers(layers)?
        .unwrap_or_else(|| (1..=layers).map(|number| !number.is_multiple_of(period)).collect());
    config.set_windows(&mut spec, &sliding, Some(4096))?;
    spec.ropes = gemma3_ropes(config, &spec)?.into();
    for (layer, is_sliding) in spec.layers.iter_mut().zip(sliding) {
        layer.attention.rope = Some(usize::from(is_sliding));
        layer.attention.qk_norm = Some(QkNorm::Head);
    }
    Ok(spec)
}

/// The text model within Gemma 3 with images.
pub(super) fn gemma3_within(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let fields = &config.fields;
    let text = fields.object("text_config")?.ok_or_else(|| fields.bad("text_config", "is missing"))?;
    // What sees images is not loaded: there is no way to hand one in.
    fields.get("vision_config");
    let inner = Config { fields: text, class: config.class, output: config.output };
    let mut spec = gemma3(&inner)?;
    super::refuse_what_was_ignored(&inner)?;
    let names = Names {
        prefix: "model.language_model.",
        other_prefixes: &["language_model.model.", "model."],
        ..spec.names
    };
    spec.names = names;
    for (field, ids) in [("bos_token_id", None), ("eos_token_id", Some(&mut spec.eos))] {
        let given = fields.token_ids(field, spec.vocab_size)?;
        match ids {
            Some(eos) if !given.is_empty() => *eos = given,
            None if !given.is_empty() => spec.bos = given.first().copied(),
            _ => {}
        }
    }
    Ok(spec)
}

/// Positions of layers that see everything, and of those with a window.
fn gemma3_ropes(config: &Config<'_>, spec: &ModelSpec) -> Result<[RopeSpec; 2], LoadError> {
    let (dim, max) = (spec.head_shape().head_dim, spec.max_position_embeddings);
    let (full, local) = (Rotation::whole(dim, 1e6, max), Rotation::whole(dim, 1e4, max));
    let fields = &config.fields;
    let plain = |theta: Option<f64>, rotation: &Rotation| RopeSpec {
        dim,
        is_interleaved: false,
        theta: theta.unwrap_or(rotation.theta),
        scaling: RopeScaling::Default,
    };
    let local_theta = fields.positive("rope_local_base_freq")?;
    let global_theta = fields.positive("rope_theta")?;
    let Some(rope) = fields.object("rope_parameters")? else {
        let global = match fields.object("rope_scaling")? {
            Some(scaling) => config.read_rope(&scaling, global_theta, &full)?,
            None => plain(global_theta, &full),
        };
        return Ok([global, plain(local_theta, &local)]);
    };
    if fields.object("rope_scaling")?.is_some() {
        return Err(fields.bad("rope_scaling", "stands beside rope_parameters; keep one of them"));
    }
    if let Some(name) = rope.names().find(|name| !matches!(*name, "full_attention" | "sliding_attention")) {
        return Err(
            rope.unsupported(name, "is not of a kind of layer; supported: full_attention, sliding_attention")
        );
    }
    let of = |name: &str, theta, rotation: &Rotation| match rope.object(name)? {
        Some(object) => config.read_rope(&object, theta, rotation),
        None => Ok(plain(theta, rotation)),
    };
    Ok([of("full_attention", global_theta, &full)?, of("sliding_attention", local_theta, &local)?])
}

/// What all have: norms whose weights are differences from 1, and scaled embeddings.
fn common(config: &Config<'_>, spec: &mut ModelSpec) -> Result<(), LoadError> {
    if config.flag("use_bidirectional_attention", false)? {
        return Err(config
            .fields
            .unsupported("use_bidirectional_attention", "is true; only causal attention is supported"));
    }
    let bias = config.flag("attention_bias", false)?;
    spec.set_attention_bias(bias, bias);
    spec.norm.weight_offset = 1.0;
    spec.embedding.scale = (spec.hidden_size as f64).sqrt() as f32;
    Ok(())
}

/// The scale of scores, and bounds of scores and logits; `absent` where the fields are missing.
fn scores(config: &Config<'_>, spec: &mut ModelSpec, absent: [Option<f64>; 2]) -> Result<(), LoadError> {
    let cap = |field: &str, absent: Option<f64>| match config.fields.has(field) {
        true => Ok(config.fields.positive(field)?.map(|cap| cap as f32)),
        false => Ok::<_, LoadError>(absent.map(|cap| cap as f32)),
    };
    let soft_cap = cap("attn_logit_softcapping", absent[0])?;
    spec.logit_soft_cap = cap("final_logit_softcapping", absent[1])?;
    let scale = config.positive("query_pre_attn_scalar", 256.0)?.powf(-0.5) as f32;
    for layer in &mut spec.layers {
        (layer.attention.soft_cap, layer.attention.scale) = (soft_cap, scale);
    }
    Ok(())
}
