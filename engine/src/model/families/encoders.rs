//! BERT, RoBERTa, XLM-RoBERTa and ModernBERT: encoders, whose tokens see each other in both directions.

use tidemill_kernels::ops::HeadShape;

use super::config::{Config, Defaults, MAX_EXTENT, MAX_POSITIONS, Rotation};
use crate::{
    error::LoadError,
    model::{
        rope::RopeSpec,
        spec::{
            AfterNorm, FusedOrder, LayerNorms, ModelSpec, Names, NormKind, PositionSpec, QkvNames, UpNames,
        },
    },
};

const BERT: Defaults = Defaults {
    eps: "layer_norm_eps",
    eps_value: Some(1e-12),
    norm: NormKind::Layer { bias: true },
    activation: ("hidden_act", "gelu"),
    is_gated: false,
    tied: true,
    names: Names {
        prefix: "",
        other_prefixes: &["bert.", "roberta."],
        embedding: "embeddings.word_embeddings",
        positions: "embeddings.position_embeddings",
        segments: "embeddings.token_type_embeddings",
        embedding_norm: "embeddings.LayerNorm",
        layers: "encoder.layer",
        qkv: QkvNames::Separate(["attention.self.query", "attention.self.key", "attention.self.value"]),
        output: "attention.output.dense",
        up: UpNames::One("intermediate.dense"),
        down: "output.dense",
        ..Names::LLAMA
    },
    norms: LayerNorms {
        before_attention: None,
        after_attention: Some("attention.output.LayerNorm"),
        before_mlp: None,
        after_mlp: Some("output.LayerNorm"),
        after: AfterNorm::Stream,
    },
    ..Defaults::LLAMA
};

/// BERT (Devlin et al. 2018, arXiv 1810.04805).
pub(super) fn bert(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    encoder(config, 0)
}

/// RoBERTa and XLM-RoBERTa (Conneau et al. 2019, arXiv 1911.02116): BERT whose positions are counted from behind the padding's.
pub(super) fn roberta(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let padding = config.fields.u32("pad_token_id")?.unwrap_or(1) as usize;
    encoder(config, padding + 1)
}

/// An encoder whose first `offset` positions are nobody's.
fn encoder(config: &Config<'_>, offset: usize) -> Result<ModelSpec, LoadError> {
    let fields = &config.fields;
    match fields.string("position_embedding_type")? {
        None | Some("absolute") => {}
        Some(other) => {
            let detail = format!("is {other:?}; supported: \"absolute\"");
            return Err(fields.unsupported("position_embedding_type", detail));
        }
    }
    for field in ["is_decoder", "add_cross_attention"] {
        if config.flag(field, false)? {
            return Err(fields.unsupported(field, "is true; the model is computed as an encoder alone"));
        }
    }
    let mut spec = config.spec(&BERT)?;
    let rows = spec.max_position_embeddings;
    if rows <= offset + 1 {
        let detail = format!("is {rows}, but the first {offset} positions are never used");
        return Err(fields.bad("max_position_embeddings", detail));
    }
    spec.max_position_embeddings = rows - offset;
    spec.embedding.positions = Some(PositionSpec { rows, offset });
    spec.embedding.segments = Some(fields.count("type_vocab_size", MAX_EXTENT)?.unwrap_or(2));
    spec.embedding.norm = true;
    spec.final_norm = false;
    spec.set_attention_bias(true, true);
    spec.set_mlp_bias(true);
    see_both_ways(&mut spec);
    Ok(spec)
}

fn see_both_ways(spec: &mut ModelSpec) {
    for layer in &mut spec.layers {
        layer.attention.is_causal = false;
    }
}

const MODERN_BERT: Defaults = Defaults {
    max_positions: Some(8192),
    eps: "norm_eps",
    eps_value: Some(1e-5),
    norm: NormKind::Layer { bias: false },
    activation: ("hidden_activation", "gelu"),
    tied: true,
    names: Names {
        prefix: "",
        other_prefixes: &["model."],
        embedding: "embeddings.tok_embeddings",
        embedding_norm: "embeddings.norm",
        final_norm: "final_norm",
        qkv: QkvNames::Fused("attn.Wqkv", FusedOrder::Stacked),
        output: "attn.Wo",
        up: UpNames::One("mlp.Wi"),
        down: "mlp.Wo",
        ..Names::LLAMA
    },
    norms: LayerNorms {
        before_attention: Some("attn_norm"),
        before_mlp: Some("mlp_norm"),
        ..LayerNorms::BEFORE
    },
    ..Defaults::LLAMA
};

/// ModernBERT (Warner et al. 2024, arXiv 2412.13663): rotary positions, most layers with a window, and one base of rotation for each kind of layer.
pub(super) fn modern_bert(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let fields = &config.fields;
    // It stands in many configurations and means nothing.
    fields.get("position_embedding_type");
    let mut spec = config.spec(&MODERN_BERT)?;
    spec.norm.kind = NormKind::Layer { bias: config.flag("norm_bias", false)? };
    spec.embedding.norm = true;
    let bias = config.flag("attention_bias", false)?;
    spec.set_attention_bias(bias, bias);
    spec.set_mlp_bias(config.flag("mlp_bias", false)?);
    see_both_ways(&mut spec);
    // What the first layer reads was normalised as embeddings are.
    if let Some(first) = spec.layers.first_mut() {
        first.norms.before_attention = None;
    }
    let HeadShape { head_dim, .. } = spec.head_shape();
    let positions = spec.max_position_embeddings;
    let rope = |kind, top, theta| rotation(config, (kind, top), Rotation::whole(head_dim, theta, positions));
    spec.ropes = vec![
        rope("full_attention", "global_rope_theta", 160_000.0)?,
        rope("sliding_attention", "local_rope_theta", 10_000.0)?,
    ];
    let every = fields.count("global_attn_every_n_layers", MAX_EXTENT)?.unwrap_or(3);
    let given = config.sliding_layers(spec.layers.len())?;
    let sliding = given.unwrap_or_else(|| (0..spec.layers.len()).map(|index| index % every != 0).collect());
    // As many tokens to either side, and the token itself.
    let window = fields.count("local_attention", MAX_POSITIONS)?.unwrap_or(128) / 2 + 1;
    for (layer, is_sliding) in spec.layers.iter_mut().zip(sliding) {
        layer.attention.rope = Some(usize::from(is_sliding));
        layer.attention.window = is_sliding.then_some(window);
    }
    Ok(spec)
}

/// Rotary positions of a kind of layers: in an object of its own, or by a base at the top level.
fn rotation(
    config: &Config<'_>,
    (kind, top): (&str, &str),
    rotation: Rotation,
) -> Result<RopeSpec, LoadError> {
    let fields = &config.fields;
    if fields.get("rope_scaling").is_some() {
        let detail = "is set; say it for each kind of layer, in rope_parameters";
        return Err(fields.unsupported("rope_scaling", detail));
    }
    let top_theta = fields.positive(top)?;
    let nested = fields.object("rope_parameters")?.map(|all| all.object(kind)).transpose()?.flatten();
    match nested {
        Some(object) => config.read_rope(&object, top_theta, &rotation),
        None => config.rope_of_base(top_theta, &rotation),
    }
}
