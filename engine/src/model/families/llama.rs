//! Llama, Mistral, Mixtral, Granite and SmolLM3.

use tidemill_kernels::ops::Routing;

use super::config::{Config, Defaults};
use crate::{
    error::LoadError,
    model::spec::{ExpertNames, ModelSpec, MoeSpec, Names},
};

/// Llama 2, 3 and their kin (Touvron et al. 2023, arXiv 2307.09288).
pub(super) fn llama(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    with_biases(config, &Defaults::LLAMA)
}

/// Llama with its two kinds of biases.
fn with_biases(config: &Config<'_>, defaults: &Defaults) -> Result<ModelSpec, LoadError> {
    let mut spec = config.rotary_spec(defaults)?;
    let attention_bias = config.flag("attention_bias", false)?;
    spec.set_attention_bias(attention_bias, attention_bias);
    spec.set_mlp_bias(config.flag("mlp_bias", false)?);
    Ok(spec)
}

/// Mistral: a window in every layer (Jiang et al. 2023, arXiv 2310.06825).
pub(super) fn mistral(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = config.rotary_spec(&Defaults::LLAMA)?;
    config.set_window_everywhere(&mut spec, Some(4096))?;
    Ok(spec)
}

/// Mixtral (Jiang et al. 2024, arXiv 2401.04088): experts in every layer.
pub(super) fn mixtral(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let experts = ExpertNames {
        router: "block_sparse_moe.gate",
        experts: "block_sparse_moe.experts",
        projections: ["w1", "w3", "w2"],
        ..Names::LLAMA.experts
    };
    let names = Names { experts, ..Names::LLAMA };
    let mut spec = config.rotary_spec(&Defaults { theta: 1e6, names, ..Defaults::LLAMA })?;
    config.set_window_everywhere(&mut spec, None)?;
    let routing = config.routing(&["num_local_experts", "num_experts"], ("num_experts_per_tok", Some(2)))?;
    let routing = Routing { renormalize: true, ..routing };
    config.set_experts(&mut spec, |_| true, |dense| MoeSpec::plain(routing, dense));
    Ok(spec)
}

/// Granite: Llama with multipliers.
///
/// That of the blocks' results, `m`, is not multiplied with anything: the residual stream is kept as `1 / m` of what it would be, which its norms do not
/// see if their epsilon is `1 / m²` of what it would be.
pub(super) fn granite(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = with_biases(config, &Defaults::LLAMA)?;
    let residual = config.positive("residual_multiplier", 1.0)?;
    spec.embedding.scale = (config.positive("embedding_multiplier", 1.0)? / residual) as f32;
    spec.norm.eps /= residual * residual;
    spec.logit_scale = (1.0 / config.positive("logits_scaling", 1.0)?) as f32;
    let scale = config.positive("attention_multiplier", 1.0)? as f32;
    for layer in &mut spec.layers {
        layer.attention.scale = scale;
    }
    let is_usable = |x: f32| x.is_finite() && x > 0.0;
    let factors = [spec.embedding.scale, spec.norm.eps as f32, spec.logit_scale];
    match factors.into_iter().all(is_usable) {
        true => Ok(spec),
        false => {
            Err(config.fields.bad("residual_multiplier", "and the other multipliers leave what f32 holds"))
        }
    }
}

/// SmolLM3: Llama, of which some layers have no rotary positions (Yang et al. 2025, arXiv 2501.18795).
pub(super) fn smollm3(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = with_biases(config, &Defaults { theta: 2e6, tied: true, ..Defaults::LLAMA })?;
    let layers = spec.layers.len();
    let interval = config.count("no_rope_layer_interval", 1 << 16, Some(4))?;
    let rotated = match config.fields.counts("no_rope_layers")? {
        Some(flags) if flags.len() == layers => flags.iter().map(|flag| *flag != 0).collect(),
        Some(flags) => {
            let detail = format!("has {} entries, but there are {layers} layers", flags.len());
            return Err(config.fields.bad("no_rope_layers", detail));
        }
        None => (1..=layers).map(|number| !number.is_multiple_of(interval)).collect::<Vec<bool>>(),
    };
    for (layer, _) in spec.layers.iter_mut().zip(&rotated).filter(|(_, rotated)| !**rotated) {
        layer.attention.rope = None;
    }
    let has_window = config.fields.get("sliding_window").is_some();
    config.set_optional_windows(&mut spec, |index| has_window && !rotated[index], None)?;
    Ok(spec)
}
