//! The families of models: how each says in `config.json` what it is.
//!
//! A family is a function from a [`Config`] to a [`ModelSpec`] and an entry in [`FAMILIES`]. What it does not read must not matter: fields in [`MEANINGFUL`] that say
//! something and were not asked for are refused.

mod cohere;
mod config;
mod deepseek;
mod encoders;
mod experts;
mod falcon;
mod gemma;
mod gpt;
mod gpt_oss;
mod llama;
mod olmo;
mod phi;
mod qwen;
mod rotation;
mod starcoder;

use std::path::Path;

use self::config::Config;
use super::{
    fields::{Fields, parse_object},
    spec::{ModelSpec, Output},
};
use crate::error::LoadError;

/// A family of models.
struct Family {
    /// Class names, as in the `architectures` of `config.json`, and what models of the class give.
    classes: &'static [(&'static str, Output)],
    /// The `model_type` of `config.json`.
    model_type: &'static str,
    read: fn(&Config<'_>) -> Result<ModelSpec, LoadError>,
}

const FAMILIES: &[Family] = &[
    Family {
        classes: &[("LlamaForCausalLM", Output::Logits), ("LlamaModel", Output::Hidden)],
        model_type: "llama",
        read: llama::llama,
    },
    Family {
        classes: &[("MistralForCausalLM", Output::Logits), ("MistralModel", Output::Hidden)],
        model_type: "mistral",
        read: llama::mistral,
    },
    Family {
        classes: &[("MixtralForCausalLM", Output::Logits), ("MixtralModel", Output::Hidden)],
        model_type: "mixtral",
        read: llama::mixtral,
    },
    Family {
        classes: &[("GraniteForCausalLM", Output::Logits), ("GraniteModel", Output::Hidden)],
        model_type: "granite",
        read: llama::granite,
    },
    Family {
        classes: &[("SmolLM3ForCausalLM", Output::Logits), ("SmolLM3Model", Output::Hidden)],
        model_type: "smollm3",
        read: llama::smollm3,
    },
    Family {
        classes: &[("Qwen2ForCausalLM", Output::Logits), ("Qwen2Model", Output::Hidden)],
        model_type: "qwen2",
        read: qwen::qwen2,
    },
    Family {
        classes: &[("Qwen2MoeForCausalLM", Output::Logits), ("Qwen2MoeModel", Output::Hidden)],
        model_type: "qwen2_moe",
        read: qwen::qwen2_moe,
    },
    Family {
        classes: &[
            ("Qwen3ForCausalLM", Output::Logits),
            ("Qwen3Model", Output::Hidden),
            ("Qwen3ForSequenceClassification", Output::Hidden),
        ],
        model_type: "qwen3",
        read: qwen::qwen3,
    },
    Family {
        classes: &[("BertModel", Output::Hidden), ("BertForSequenceClassification", Output::Hidden)],
        model_type: "bert",
        read: encoders::bert,
    },
    Family {
        classes: &[("RobertaModel", Output::Hidden), ("RobertaForSequenceClassification", Output::Hidden)],
        model_type: "roberta",
        read: encoders::roberta,
    },
    Family {
        classes: &[
            ("XLMRobertaModel", Output::Hidden),
            ("XLMRobertaForSequenceClassification", Output::Hidden),
        ],
        model_type: "xlm-roberta",
        read: encoders::roberta,
    },
    Family {
        classes: &[
            ("ModernBertModel", Output::Hidden),
            ("ModernBertForSequenceClassification", Output::Hidden),
        ],
        model_type: "modernbert",
        read: encoders::modern_bert,
    },
    Family {
        classes: &[("Qwen3MoeForCausalLM", Output::Logits), ("Qwen3MoeModel", Output::Hidden)],
        model_type: "qwen3_moe",
        read: qwen::qwen3_moe,
    },
    Family {
        classes: &[("GemmaForCausalLM", Output::Logits), ("GemmaModel", Output::Hidden)],
        model_type: "gemma",
        read: gemma::gemma1,
    },
    Family {
        classes: &[("Gemma2ForCausalLM", Output::Logits), ("Gemma2Model", Output::Hidden)],
        model_type: "gemma2",
        read: gemma::gemma2,
    },
    Family {
        classes: &[("Gemma3ForCausalLM", Output::Logits), ("Gemma3TextModel", Output::Hidden)],
        model_type: "gemma3_text",
        read: gemma::gemma3,
    },
    Family {
        classes: &[("Gemma3ForConditionalGeneration", Output::Logits)],
        model_type: "gemma3",
        read: gemma::gemma3_within,
    },
    Family {
        classes: &[("Phi3ForCausalLM", Output::Logits), ("Phi3Model", Output::Hidden)],
        model_type: "phi3",
        read: phi::phi3,
    },
    Family {
        classes: &[("Olmo2ForCausalLM", Output::Logits), ("Olmo2Model", Output::Hidden)],
        model_type: "olmo2",
        read: olmo::olmo2,
    },
    Family {
        classes: &[("CohereForCausalLM", Output::Logits), ("CohereModel", Output::Hidden)],
        model_type: "cohere",
        read: cohere::cohere,
    },
    Family {
        classes: &[("FalconForCausalLM", Output::Logits), ("FalconModel", Output::Hidden)],
        model_type: "falcon",
        read: falcon::falcon,
    },
    Family {
        classes: &[("GPT2LMHeadModel", Output::Logits), ("GPT2Model", Output::Hidden)],
        model_type: "gpt2",
        read: gpt::gpt2,
    },
    Family {
        classes: &[("GPTNeoXForCausalLM", Output::Logits), ("GPTNeoXModel", Output::Hidden)],
        model_type: "gpt_neox",
        read: gpt::gpt_neox,
    },
    Family {
        classes: &[("Starcoder2ForCausalLM", Output::Logits), ("Starcoder2Model", Output::Hidden)],
        model_type: "starcoder2",
        read: starcoder::starcoder2,
    },
    Family {
        classes: &[("GptOssForCausalLM", Output::Logits), ("GptOssModel", Output::Hidden)],
        model_type: "gpt_oss",
        read: gpt_oss::gpt_oss,
    },
    Family {
        classes: &[("DeepseekV2ForCausalLM", Output::Logits), ("DeepseekV2Model", Output::Hidden)],
        model_type: "deepseek_v2",
        read: deepseek::deepseek_v2,
    },
    Family {
        classes: &[("DeepseekV3ForCausalLM", Output::Logits), ("DeepseekV3Model", Output::Hidden)],
        model_type: "deepseek_v3",
        read: deepseek::deepseek_v3,
    },
];

/// Fields that change what some family computes. A family that has no such thing does not ask for them, and then they must say nothing.
const MEANINGFUL: &[&str] = &[
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "mlp_only_layers",
    "kv_lora_rank",
    "q_lora_rank",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "no_rope_layers",
    "sliding_window",
    "layer_types",
    "alibi",
    "new_decoder_architecture",
    "use_qk_norm",
    "use_parallel_residual",
    "attention_bias",
    "mlp_bias",
    "qkv_bias",
    "use_bias",
    "lm_head_bias",
    "rope_scaling",
    "rope_parameters",
    "num_key_value_heads",
    "head_dim",
    "position_embedding_type",
    "swiglu_limit",
    "swiglu_alpha",
    "scale_attn_by_inverse_layer_idx",
    "use_bidirectional_attention",
    "vision_config",
    "text_config",
];

/// Reads the bytes of a `config.json`.
pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<ModelSpec, LoadError> {
    let map = parse_object(path, bytes)?;
    let fields = Fields::new(path, &map);
    let (family, class, output) = family(&fields)?;
    let config = Config { fields, class, output };
    let spec = (family.read)(&config)?;
    refuse_what_was_ignored(&config)?;
    config.check_sizes(&spec)?;
    Ok(spec)
}

fn family(fields: &Fields<'_>) -> Result<(&'static Family, &'static str, Output), LoadError> {
    let classes =
        || FAMILIES.iter().flat_map(|family| family.classes.iter().map(move |class| (family, class)));
    let supported = || classes().map(|(_, class)| class.0).collect::<Vec<_>>().join(", ");
    let name = match fields.strings("architectures")?.as_deref() {
        Some([name]) => *name,
        Some(_) => return Err(fields.bad("architectures", "must name exactly one architecture")),
        None => return Err(fields.bad("architectures", format!("is missing; supported: {}", supported()))),
    };
    let Some((family, &(class, output))) = classes().find(|(_, class)| class.0 == name) else {
        return Err(
            fields.unsupported("architectures", format!("names {name:?}; supported: {}", supported()))
        );
    };
    match fields.string("model_type")? {
        Some(model_type) if model_type != family.model_type => {
            Err(fields.bad("model_type", format!("is {model_type:?}, which contradicts architecture {name}")))
        }
        _ => Ok((family, class, output)),
    }
}

/// Fields that would change what is computed, if we had asked for them.
fn refuse_what_was_ignored(config: &Config<'_>) -> Result<(), LoadError> {
    let fields = &config.fields;
    let Some(field) = MEANINGFUL.iter().find(|field| fields.is_ignored(field)) else { return Ok(()) };
    // Absent by another name.
    let says_nothing = match *field {
        "layer_types" => {
            fields.strings(field)?.is_some_and(|types| types.iter().all(|t| *t == "full_attention"))
        }
        _ => fields.boolean(field).is_ok_and(|value| value == Some(false)),
    };
    match says_nothing {
        true => refuse_what_was_ignored(config),
        false => Err(fields.unsupported(field, format!("is set, but {} has no such thing", config.class))),
    }
}
