//! Qwen2, Qwen3 and their mixtures of experts.

use super::config::{Config, Defaults};
use crate::{
    error::LoadError,
    model::spec::{ModelSpec, QkNorm},
};

/// Qwen2 and 2.5 (Yang et al. 2024, arXiv 2407.10671): Llama with biases of queries, keys and values.
pub(super) fn qwen2(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = config.rotary_spec(&Defaults::LLAMA)?;
    spec.set_attention_bias(true, false);
    windows_of_late_layers(config, &mut spec)?;
    Ok(spec)
}

/// Qwen3 (Yang et al. 2025, arXiv 2505.09388): with norms of queries and keys.
pub(super) fn qwen3(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = qwen3_attention(config)?;
    windows_of_late_layers(config, &mut spec)?;
    Ok(spec)
}

fn qwen3_attention(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = config.rotary_spec(&Defaults { head_dim: Some(128), ..Defaults::LLAMA })?;
    let bias = config.flag("attention_bias", false)?;
    spec.set_attention_bias(bias, bias);
    for layer in &mut spec.layers {
        layer.attention.qk_norm = Some(QkNorm::Head);
    }
    Ok(spec)
}

/// With `use_sliding_window`, the layers from `max_window_layers` on have the window, unless `layer_types` says otherwise.
fn windows_of_late_layers(config: &Config<'_>, spec: &mut ModelSpec) -> Result<(), LoadError> {
    let layers = spec.layers.len();
    let first = config.fields.u32("max_window_layers")?.map_or(28, |n| n as usize);
    set_windows(config, spec, |index| index >= first, layers)
}

fn set_windows(
    config: &Config<'_>,
    spec: &mut ModelSpec,
    is_sliding: impl Fn(usize) -> bool,
    layers: usize,
) -> Result<(), LoadError> {
    let given = config.sliding_layers(layers)?;
    if !config.flag("use_sliding_window", false)? {
        // The window stands in many configurations and means nothing.
        config.fields.get("sliding_window");
        return match given {
            Some(sliding) if sliding.contains(&true) => {
                let detail = "has sliding_attention, but use_sliding_window is not true";
                Err(config.fields.bad("layer_types", detail))
            }
            _ => Ok(()),
        };
    }
    let sliding = given.unwrap_or_else(|| (0..layers).map(is_sliding).collect());
    config.set_windows(spec, &sliding, Some(4096))
}
