//! Qwen2, Qwen3 and their mixtures of experts.

use tidemill_kernels::ops::Routing;

use super::config::{Config, Defaults, MAX_EXTENT};
use crate::{
    error::LoadError,
    model::spec::{DenseSpec, ExpertNames, ModelSpec, MoeSpec, Names, QkNorm, SharedSpec},
};

/// Windows of configurations that name layers with one and no width.
const WINDOW: Option<usize> = Some(4096);

/// Qwen2 and 2.5 (Yang et al. 2024, arXiv 2407.10671): Llama with biases of queries, keys and values.
pub(super) fn qwen2(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = config.rotary_spec(&Defaults::LLAMA)?;
    spec.set_attention_bias(true, false);
    let first = max_window_layers(config)?;
    config.set_optional_windows(&mut spec, |index| index >= first, WINDOW)?;
    Ok(spec)
}

/// Qwen3 (Yang et al. 2025, arXiv 2505.09388): with norms of queries and keys.
pub(super) fn qwen3(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = with_norms(config)?;
    let first = max_window_layers(config)?;
    config.set_optional_windows(&mut spec, |index| index >= first, WINDOW)?;
    Ok(spec)
}

/// Qwen2-MoE: with experts, one of them shared and gated.
pub(super) fn qwen2_moe(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let experts = ExpertNames { shared: "mlp.shared_expert", ..Names::LLAMA.experts };
    let names = Names { experts, ..Names::LLAMA };
    let mut spec = config.rotary_spec(&Defaults { names, ..Defaults::LLAMA })?;
    spec.set_attention_bias(config.flag("qkv_bias", true)?, false);
    let end = max_window_layers(config)?;
    config.set_optional_windows(&mut spec, |index| index < end && index.is_multiple_of(2), WINDOW)?;
    let shared = config.count("shared_expert_intermediate_size", MAX_EXTENT, Some(5632))?;
    with_experts(config, &mut spec, (4, 1408), |dense| {
        Some(SharedSpec { dense: DenseSpec { width: shared, ..dense }, has_gate: true })
    })?;
    Ok(spec)
}

/// Qwen3-MoE: with experts.
pub(super) fn qwen3_moe(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = with_norms(config)?;
    config.set_optional_windows(&mut spec, |_| true, WINDOW)?;
    with_experts(config, &mut spec, (8, 768), |_| None)?;
    Ok(spec)
}

fn with_norms(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let mut spec = config.rotary_spec(&Defaults { head_dim: Some(128), ..Defaults::LLAMA })?;
    let bias = config.flag("attention_bias", false)?;
    spec.set_attention_bias(bias, bias);
    for layer in &mut spec.layers {
        layer.attention.qk_norm = Some(QkNorm::Head);
    }
    Ok(spec)
}

/// Puts experts into the sparse layers; `absent` is how many a token goes to and their width, where the file does not say.
fn with_experts(
    config: &Config<'_>,
    spec: &mut ModelSpec,
    absent: (usize, usize),
    shared: impl Fn(DenseSpec) -> Option<SharedSpec>,
) -> Result<(), LoadError> {
    let routing =
        config.routing(&["num_experts", "num_local_experts"], ("num_experts_per_tok", Some(absent.0)))?;
    let routing = Routing { renormalize: config.flag("norm_topk_prob", false)?, ..routing };
    let width = config.expert_width(Some(absent.1))?;
    let sparse = config.sparse_layers(spec.layers.len())?;
    config.set_experts(
        spec,
        |index| sparse[index],
        |dense| MoeSpec { width, shared: shared(dense), ..MoeSpec::plain(routing, dense) },
    );
    Ok(())
}

fn max_window_layers(config: &Config<'_>) -> Result<usize, LoadError> {
    Ok(config.fields.u32("max_window_layers")?.map_or(28, |n| n as usize))
}
