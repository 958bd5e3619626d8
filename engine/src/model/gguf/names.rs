//! Names of tensors: GGUF's, and those of the same tensors on the hub.

/// The name on the hub, or `None` for a tensor that stands nowhere there.
pub(super) fn hub_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (part, kind) = rest.rsplit_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    matches!(kind, "weight" | "bias").then(|| format!("model.layers.{layer}.{part}.{kind}"))
}

/// Whether rows of this tensor are heads of queries or keys, which llama.cpp stores in pairs for its own rotation in models of the `llama` architecture.
pub(super) fn has_rotated_heads(hub_name: &str) -> bool {
    [".q_proj.weight", ".q_proj.bias", ".k_proj.weight", ".k_proj.bias"]
        .iter()
        .any(|end| hub_name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_layers_and_of_the_rest() {
        assert_eq!(hub_name("blk.11.attn_q.bias").as_deref(), Some("model.layers.11.self_attn.q_proj.bias"));
        assert_eq!(hub_name("output.weight").as_deref(), Some("lm_head.weight"));
        for other in
            ["blk.x.attn_q.weight", "blk.1.attn_z.weight", "blk.1.attn_q", "blk.1", "rope_freqs.weight", ""]
        {
            assert_eq!(hub_name(other), None, "{other}");
        }
    }
}
