//! StarCoder2.

use super::config::{Config, Defaults};
use crate::{
    error::LoadError,
    model::spec::{ModelSpec, Names, NormKind, UpNames},
};

/// StarCoder2 (Lozhkov et al. 2024, arXiv 2402.19173): layer norms and a feed-forward block without gate.
pub(super) fn starcoder2(config: &Config<'_>) -> Result<ModelSpec, LoadError> {
    let names = Names { up: UpNames::One("mlp.c_fc"), down: "mlp.c_proj", ..Names::LLAMA };
    let mut spec = config.rotary_spec(&Defaults {
        eps: "norm_epsilon",
        eps_value: Some(1e-5),
        norm: NormKind::Layer { bias: true },
        activation: ("hidden_act", "gelu_pytorch_tanh"),
        is_gated: false,
        tied: true,
        names,
        ..Defaults::LLAMA
    })?;
    let bias = config.flag("use_bias", true)?;
    spec.set_attention_bias(bias, bias);
    spec.set_mlp_bias(bias);
    config.set_window_everywhere(&mut spec, None)?;
    Ok(spec)
}
