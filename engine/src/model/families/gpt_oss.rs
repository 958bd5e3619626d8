//! GPT-OSS.

use tidemill_kernels::ops::{Activation, Routing};

use super::{
    config::{Config, Defaults, Rotation},
    rotation::yarn_scale,
};
use crate::{
    error::LoadError,
    model::{
        rope::RopeScaling,
        spec::{ExpertNames, ModelSpec, MoeSpec, Names},
    },
};

/// GPT-OSS (OpenAI 2025, arXiv 2508.10925): windows in every other layer, sinks, experts whose gate is bounded.
pub(super) fn gpt_oss(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let experts = ExpertNames {
        router: "mlp.router",
        projections: ["gate_up_proj", "gate_up_proj", "down_proj"],
        is_stacked: true,
        ..Names::LLAMA.experts
    };
    let names = Names { experts, ..Names::LLAMA };
    let mut spec = config.spec(&Defaults { head_dim: Some(64), names, ..Defaults::LLAMA })?;
    let (dim, max) = (spec.head_shape().head_dim, spec.max_position_embeddings);
    let mut rope = config.rope(&Rotation::whole(dim, 150_000.0, max))?;
    if config.fields.get("rope_parameters").or(config.fields.get("rope_scaling")).is_none() {
        rope.scaling = RopeScaling::Yarn {
            factor: 32.0,
            attention_factor: yarn_scale(32.0, 1.0),
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: 4096,
            truncate: false,
        };
    }
    spec.set_rope(rope);
    let bias = config.flag("attention_bias", true)?;
    spec.set_attention_bias(bias, bias);
    let layers = spec.layers.len();
    let sliding =
        config.sliding_layers(layers)?.unwrap_or_else(|| (0..layers).map(|i| i.is_multiple_of(2)).collect());
    config.set_windows(&mut spec, &sliding, Some(128))?;
    for layer in &mut spec.layers {
        layer.attention.has_sinks = true;
    }
    let activation = Activation::SwigluOai {
        alpha: config.positive("swiglu_alpha", 1.702)? as f32,
        limit: config.positive("swiglu_limit", 7.0)? as f32,
    };
    let routing = config.routing(&["num_local_experts", "num_experts"], ("num_experts_per_tok", Some(4)))?;
    // A softmax over the chosen alone is one over all, divided by what the chosen get of it.
    let routing = Routing { renormalize: true, ..routing };
    config.set_experts(
        &mut spec,
        |_| true,
        |dense| MoeSpec { router_bias: true, bias: true, activation, ..MoeSpec::plain(routing, dense) },
    );
    Ok(spec)
}
