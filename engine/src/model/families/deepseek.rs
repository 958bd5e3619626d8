//! DeepSeek-V2 and V3.

use tidemill_kernels::ops::{ExpertGroups, ExpertScoring, Routing};

use super::{
    config::{Config, Defaults, MAX_EXTENT, Rotation},
    rotation::yarn_scale,
};
use crate::{
    error::LoadError,
    model::spec::{DenseSpec, Heads, LatentHeads, ModelSpec, MoeSpec, SharedSpec},
};

/// DeepSeek-V2 (arXiv 2405.04434): latent attention, shared experts, groups of experts.
pub(super) fn deepseek_v2(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = latent(config, true)?;
    spec.set_mlp_bias(config.flag("mlp_bias", false)?);
    if config.flag("norm_topk_prob", false)? {
        let detail = "is true; this architecture takes the scores of the chosen experts as they are";
        return Err(config.fields.unsupported("norm_topk_prob", detail));
    }
    expect(config, "scoring_func", "softmax")?;
    let mut routing = routing(config, 1.0)?;
    routing.groups = match config.fields.string("topk_method")?.unwrap_or("greedy") {
        "greedy" => None,
        "group_limited_greedy" => groups(config, &routing, false)?,
        other => {
            let detail = format!("is {other:?}; supported: greedy, group_limited_greedy");
            return Err(config.fields.unsupported("topk_method", detail));
        }
    };
    with_experts(config, &mut spec, (routing, 0, false))?;
    Ok(spec)
}

/// DeepSeek-V3 (arXiv 2412.19437): experts are scored by themselves, and chosen with the help of a bias.
pub(super) fn deepseek_v3(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = latent(config, config.flag("rope_interleave", true)?)?;
    expect(config, "scoring_func", "sigmoid")?;
    expect(config, "topk_method", "noaux_tc")?;
    let routing = routing(config, 2.5)?;
    let routing = Routing {
        scoring: ExpertScoring::Sigmoid,
        renormalize: config.flag("norm_topk_prob", true)?,
        groups: groups(config, &routing, true)?,
        ..routing
    };
    with_experts(config, &mut spec, (routing, 3, true))?;
    Ok(spec)
}

/// Latent attention over Llama's wiring.
fn latent(config: &Config<'_>, is_interleaved: bool) -> Result<ModelSpec, LoadError> {
    let fields = &config.fields;
    // A head's width is made of the fields below.
    fields.get("head_dim");
    let mut spec = config.spec(&Defaults { has_head_dim: false, head_dim: Some(1), ..Defaults::LLAMA })?;
    let given = spec.head_shape();
    if given.num_heads != given.num_kv_heads {
        return Err(fields.bad("num_key_value_heads", "must be num_attention_heads in latent attention"));
    }
    let query_rank = match fields.has("q_lora_rank") {
        true => fields.count("q_lora_rank", MAX_EXTENT)?,
        false => Some(1536),
    };
    let heads = LatentHeads {
        num_heads: given.num_heads,
        query_rank,
        latent_dim: fields.required_count("kv_lora_rank", MAX_EXTENT)?,
        nope_dim: fields.required_count("qk_nope_head_dim", MAX_EXTENT)?,
        rope_dim: fields.required_count("qk_rope_head_dim", MAX_EXTENT)?,
        value_dim: fields.required_count("v_head_dim", MAX_EXTENT)?,
        // The reference takes its default for these two norms, whatever rms_norm_eps is.
        eps: 1e-6,
    };
    spec.heads = Heads::Latent(heads);
    let rotation = Rotation {
        is_interleaved,
        ..Rotation::whole(heads.rope_dim, 10_000.0, spec.max_position_embeddings)
    };
    spec.set_rope(config.rope(&rotation)?);
    let bias = config.flag("attention_bias", false)?;
    spec.set_attention_bias(bias, bias);
    let scale = ((heads.nope_dim + heads.rope_dim) as f64).powf(-0.5) * score_factor(config)?;
    for layer in &mut spec.layers {
        layer.attention.scale = scale as f32;
    }
    Ok(spec)
}

/// What scores are multiplied with besides, where positions are stretched: `mscale_all_dim` of the reference code.
fn score_factor(config: &Config<'_>) -> Result<f64, LoadError> {
    for field in ["rope_parameters", "rope_scaling"] {
        let Some(rope) = config.fields.object(field)? else { continue };
        let kind = rope.string("rope_type")?.or(rope.string("type")?);
        let weight = rope.number("mscale_all_dim")?.filter(|weight| *weight != 0.0);
        if let (Some(weight), Some(factor), true) =
            (weight, rope.positive("factor")?, kind.is_some_and(|kind| kind != "default"))
        {
            return Ok(yarn_scale(factor, weight).powi(2));
        }
    }
    Ok(1.0)
}

fn routing(config: &Config<'_>, scale: f64) -> Result<Routing, LoadError> {
    let routing = config.routing(&["n_routed_experts"], ("num_experts_per_tok", None))?;
    Ok(Routing { scale: config.positive("routed_scaling_factor", scale)? as f32, ..routing })
}

fn groups(
    config: &Config<'_>,
    routing: &Routing,
    by_top_two: bool,
) -> Result<Option<ExpertGroups>, LoadError> {
    let count = config.fields.required_count("n_group", routing.experts)?;
    let top = config.fields.required_count("topk_group", count)?;
    let size = routing.experts / count;
    if !routing.experts.is_multiple_of(count) || (by_top_two && size < 2) {
        let detail =
            format!("is {count}, which does not divide n_routed_experts ({}) into groups", routing.experts);
        return Err(config.fields.bad("n_group", detail));
    }
    if top * size < routing.top_k {
        let detail = format!("is {top}: so many groups have fewer than num_experts_per_tok experts");
        return Err(config.fields.bad("topk_group", detail));
    }
    Ok((top < count).then_some(ExpertGroups { count, top, by_top_two }))
}

/// Puts experts into all layers but the first few.
fn with_experts(
    config: &Config<'_>,
    spec: &mut ModelSpec,
    (routing, first_absent, choice_bias): (Routing, u32, bool),
) -> Result<(), LoadError> {
    if config.count("moe_layer_freq", MAX_EXTENT, Some(1))? != 1 {
        return Err(config.fields.unsupported("moe_layer_freq", "is not 1; supported: 1"));
    }
    let first = config.fields.u32("first_k_dense_replace")?.unwrap_or(first_absent) as usize;
    let width = config.expert_width(None)?;
    let shared = config.fields.required_count("n_shared_experts", 1 << 10)? * width;
    config.set_experts(
        spec,
        |index| index >= first,
        |dense| MoeSpec {
            width,
            choice_bias,
            shared: Some(SharedSpec { dense: DenseSpec { width: shared, ..dense }, has_gate: false }),
            ..MoeSpec::plain(routing, dense)
        },
    );
    Ok(())
}

/// A field that must have this value, if it is there.
fn expect(config: &Config<'_>, field: &str, value: &str) -> Result<(), LoadError> {
    match config.fields.string(field)? {
        Some(given) if given != value => {
            Err(config.fields.unsupported(field, format!("is {given:?}; supported: {value:?}")))
        }
        _ => Ok(()),
    }
}
