//! Llama, Mistral, Mixtral, Granite and SmolLM3.

use super::config::{Config, Defaults};
use crate::{error::LoadError, model::spec::ModelSpec};

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
    let all = vec![window_is_set(config, Some(4096))?; spec.layers.len()];
    config.set_windows(&mut spec, &all, Some(4096))?;
    Ok(spec)
}

/// Whether `sliding_window` says that there is one.
fn window_is_set(config: &Config<'_>, absent: Option<usize>) -> Result<bool, LoadError> {
    let fields = &config.fields;
    Ok(if fields.has("sliding_window") { fields.get("sliding_window").is_some() } else { absent.is_some() })
}
