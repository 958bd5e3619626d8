//! From metadata to the `config.json` that says the same.

use serde_json::{Map, Value as Json, json};

use super::{
    Source,
    reader::{Head, Value},
};

/// Architectures of GGUF, and the class of the hub that each is.
const ARCHITECTURES: [(&str, &str); 3] =
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")];

/// Metadata of things that these architectures may have and that we would compute wrongly.
const FOREIGN: [&str; 6] = [
    "expert_count",
    "attention.layer_norm_epsilon",
    "attention.logit_softcapping",
    "final_logit_softcapping",
    "attention.scale",
    "logit_scale",
];

/// Metadata under the architecture's prefix.
pub(super) struct Meta<'a> {
    head: &'a Head,
    pub architecture: &'a str,
}

impl<'a> Meta<'a> {
    /// # Errors
    /// In words: no architecture, or one that is not supported.
    pub fn new(head: &'a Head) -> Result<(Meta<'a>, &'static str), String> {
        let Some(Value::Text(architecture)) = head.metadata.get("general.architecture") else {
            return Err("metadata \"general.architecture\" is missing".into());
        };
        let Some((_, class)) = ARCHITECTURES.iter().find(|(name, _)| name == architecture) else {
            let supported = ARCHITECTURES.map(|(name, _)| name).join(", ");
            return Err(format!(
                "metadata \"general.architecture\" is {architecture:?}; supported in GGUF: {supported}. Take the safetensors checkpoint \
                 instead, with --quantization int8 or fp8 where memory is short"
            ));
        };
        let meta = Meta { head, architecture };
        for field in FOREIGN {
            if meta.get(field).is_some_and(|v| !matches!(v, Value::Unsigned(0))) {
                return Err(format!(
                    "metadata \"{architecture}.{field}\" is set, which is not supported in GGUF"
                ));
            }
        }
        Ok((meta, class))
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        self.head.metadata.get(&format!("{}.{field}", self.architecture))
    }

    fn count(&self, field: &str) -> Result<Option<u64>, String> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Unsigned(n)) => Ok(Some(*n)),
            Some(Value::Signed(n)) if *n >= 0 => Ok(Some(n.unsigned_abs())),
            Some(_) => Err(format!("metadata \"{}.{field}\" is no count for all layers", self.architecture)),
        }
    }

    fn required(&self, field: &str) -> Result<u64, String> {
        self.count(field)?.ok_or_else(|| format!("metadata \"{}.{field}\" is missing", self.architecture))
    }

    fn number(&self, field: &str) -> Result<Option<f64>, String> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x)),
            Some(_) => Err(format!("metadata \"{}.{field}\" is no number", self.architecture)),
        }
    }

    /// Elements of a query or key head.
    pub fn head_dim(&self) -> Result<u64, String> {
        let heads = self.required("attention.head_count")?;
        match self.count("attention.key_length")? {
            Some(dim) => Ok(dim),
            None => self
                .required("embedding_length")?
                .checked_div(heads)
                .ok_or_else(|| "metadata \"attention.head_count\" is 0".to_owned()),
        }
    }
}

/// The `config.json`, with special tokens of the tokenizer.
pub(super) fn config(source: &Source) -> Result<Json, String> {
    let (meta, class) = Meta::new(&source.head)?;
    let head = &source.head;
    let vocab = match head.tensors.get("token_embd.weight").map(|info| info.shape.as_slice()) {
        Some(&[vocab, _]) => vocab,
        _ => return Err("tensor \"token_embd.weight\" is missing, or no matrix".into()),
    };
    let (head_dim, max_positions) = (meta.head_dim()?, meta.required("context_length")?);
    if meta.count("attention.value_length")?.is_some_and(|dim| dim != head_dim)
        || meta.count("rope.dimension_count")?.is_some_and(|dim| dim != head_dim)
    {
        return Err(
            "has heads whose queries, values or rotations differ in width, which is not supported in GGUF"
                .into(),
        );
    }
    let heads = meta.required("attention.head_count")?;
    let mut config = json!({
        "architectures": [class],
        "model_type": meta.architecture,
        "vocab_size": vocab,
        "hidden_size": meta.required("embedding_length")?,
        "intermediate_size": meta.required("feed_forward_length")?,
        "num_hidden_layers": meta.required("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.count("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "tie_word_embeddings": !head.tensors.contains_key("output.weight"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon")?
            .ok_or("metadata \"attention.layer_norm_rms_epsilon\" is missing")?,
        "rope_parameters": rope(source, &meta, head_dim)?,
    });
    let map = config.as_object_mut().expect("it was made as an object");
    if meta.architecture == "llama" {
        // Mistral is a llama there.
        if head.tensors.contains_key("blk.0.attn_q.bias") {
            map.insert("attention_bias".into(), true.into());
        }
        if head.tensors.contains_key("blk.0.ffn_up.bias") {
            map.insert("mlp_bias".into(), true.into());
        }
    }
    if meta.count("attention.sliding_window")?.is_some_and(|window| window != 0 && window < max_positions) {
        return Err("has a sliding window, which is not supported in GGUF".into());
    }
    for (field, key) in [("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id")] {
        if let Some(Value::Unsigned(id)) = head.metadata.get(&format!("tokenizer.ggml.{key}")) {
            map.insert(field.into(), (*id).into());
        }
    }
    Ok(config)
}

/// Further tokens that end a turn, for `generation_config.json`.
pub(super) fn generation(head: &Head) -> Json {
    let ids = ["eos_token_id", "eot_token_id", "eom_token_id"].iter().filter_map(|key| {
        match head.metadata.get(&format!("tokenizer.ggml.{key}")) {
            Some(Value::Unsigned(id)) => Some(*id),
            _ => None,
        }
    });
    let mut ids: Vec<u64> = ids.collect();
    ids.dedup();
    if ids.is_empty() { json!({}) } else { json!({ "eos_token_id": ids }) }
}

fn rope(source: &Source, meta: &Meta, head_dim: u64) -> Result<Json, String> {
    let theta = meta.number("rope.freq_base")?.unwrap_or(10_000.0);
    let mut rope = Map::from_iter([("rope_theta".to_owned(), json!(theta))]);
    let kind = match meta.get("rope.scaling.type") {
        None => "none",
        Some(Value::Text(kind)) => kind,
        Some(_) => return Err("metadata \"rope.scaling.type\" is no text".into()),
    };
    let factor = meta.number("rope.scaling.factor")?;
    let original = meta.count("rope.scaling.original_context_length")?;
    match (kind, source.floats("rope_freqs.weight")?) {
        ("none", None) => {
            rope.insert("rope_type".into(), "default".into());
        }
        ("none", Some(factors)) => rope.extend(llama3(&factors, theta, head_dim)?),
        ("linear", None) => {
            rope.insert("rope_type".into(), "linear".into());
            rope.insert("factor".into(), json!(factor.unwrap_or(1.0)));
        }
        ("yarn", None) => {
            rope.insert("rope_type".into(), "yarn".into());
            rope.insert("factor".into(), json!(factor.unwrap_or(1.0)));
            rope.extend(original.map(|n| ("original_max_position_embeddings".to_owned(), json!(n))));
        }
        (kind, _) => {
            return Err(format!(
                "has rotations of kind {kind:?}; supported: none, linear, yarn, and those of Llama 3"
            ));
        }
    }
    Ok(Json::Object(rope))
}

/// Llama 3's factors of frequencies stand in a tensor. All its models share what they are made of but one number, the largest factor.
fn llama3(factors: &[f32], theta: f64, head_dim: u64) -> Result<Map<String, Json>, String> {
    let (low, high, original) = (1.0, 4.0, 8192.0);
    let factor = factors.iter().fold(1.0_f64, |all, &f| all.max(f64::from(f)));
    let expected = |i: usize| {
        // transformers, `_compute_llama3_parameters`.
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    let fits = |(i, &f): (usize, &f32)| (f64::from(f) - expected(i)).abs() <= 1e-3 * expected(i);
    if factors.len() as u64 != head_dim / 2 || !factors.iter().enumerate().all(fits) {
        return Err("tensor \"rope_freqs.weight\" holds factors of frequencies that are not Llama 3's, which is not supported".into());
    }
    let Json::Object(map) = json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original as u64,
    }) else {
        return Err("no object".into());
    };
    Ok(map)
}
