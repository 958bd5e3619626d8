//! `adapter_config.json`, as PEFT writes it.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::LoadError;

/// The file's name.
pub const CONFIG: &str = "adapter_config.json";

/// What it says, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// r.
    pub rank: usize,
    /// What the product of both matrices is multiplied with.
    pub scale: f32,
    /// Last components of the names of the modules that it changes, where the file lists them and means all layers.
    pub targets: Option<Vec<String>>,
}

/// Fields that change what is computed in ways that are not implemented, and what to do; any value but null, false and an empty one is refused.
const REFUSED: [(&str, &str); 13] = [
    ("use_dora", "merge the adapter into the model"),
    ("alora_invocation_tokens", "activated adapters change in the midst of a prompt"),
    ("modules_to_save", "whole modules cannot be replaced per request; merge the adapter into the model"),
    (
        "trainable_token_indices",
        "rows of the embedding cannot be replaced per request; merge the adapter into the model",
    ),
    ("lora_bias", "train without biases, or merge the adapter into the model"),
    ("rank_pattern", "one rank holds for all modules"),
    ("alpha_pattern", "one scale holds for all modules"),
    ("layer_replication", "merge the adapter into the model"),
    (
        "target_parameters",
        "parameters of experts cannot be changed per request; merge the adapter into the model",
    ),
    ("use_qalora", "merge the adapter into the model"),
    ("use_bdlora", "merge the adapter into the model"),
    ("arrow_config", "routed adapters are not implemented"),
    ("layers_pattern", "name the layers in layers_to_transform"),
];

impl AdapterConfig {
    /// Reads the bytes of the file; `path` is for messages.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] for what is not implemented, [`LoadError::Format`] for fields that are missing, of the wrong type or out of
    /// range. Both name the field.
    pub fn read(path: &Path, bytes: &[u8]) -> Result<Self, LoadError> {
        let format = |detail: String| LoadError::Format { path: path.into(), detail };
        let unsupported = |detail: String| LoadError::Unsupported { path: path.into(), detail };
        let fields: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| format(format!("not a JSON object: {error}")))?;
        let kind = fields.get("peft_type").and_then(Value::as_str).unwrap_or_default();
        if kind != "LORA" {
            return Err(unsupported(format!("peft_type is {kind:?}; only LORA is implemented")));
        }
        for (name, what_to_do) in REFUSED {
            if fields.get(name).is_some_and(says_something) {
                return Err(unsupported(format!("{name} is not supported: {what_to_do}")));
            }
        }
        match fields.get("bias") {
            None | Some(Value::Null) => {}
            Some(Value::String(bias)) if bias == "none" => {}
            Some(bias) => {
                return Err(unsupported(format!("bias is {bias}; only \"none\" is supported")));
            }
        }
        let rank = fields.get("r").and_then(Value::as_u64).filter(|r| (1..=1 << 16).contains(r));
        let rank = rank.ok_or_else(|| format("r must be an integer of at least 1".into()))? as usize;
        let alpha = match fields.get("lora_alpha") {
            None => Some(8.0),
            Some(alpha) => alpha.as_f64(),
        };
        let alpha = alpha.ok_or_else(|| format("lora_alpha must be a number".into()))?;
        // Kalajdzievski 2023, rsLoRA: stable for high ranks.
        let divisor = match fields.get("use_rslora") {
            None | Some(Value::Null | Value::Bool(false)) => rank as f64,
            Some(Value::Bool(true)) => (rank as f64).sqrt(),
            Some(other) => return Err(format(format!("use_rslora is {other}, not true or false"))),
        };
        let scale = (alpha / divisor) as f32;
        if !scale.is_finite() {
            return Err(format(format!("lora_alpha {alpha} makes no finite scale")));
        }
        Ok(Self { rank, scale, targets: targets(&fields).map_err(format)? })
    }
}

/// Whether a field's value asks for something.
fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(items) => !items.is_empty(),
        _ => true,
    }
}

/// `None` for a pattern, for "all-linear", and where only some layers are meant: the tensors say then what is changed.
fn targets(fields: &Map<String, Value>) -> Result<Option<Vec<String>>, String> {
    let wrong = || "target_modules must be a list of names, or a string".to_owned();
    let some_layers = ["layers_to_transform", "exclude_modules"]
        .iter()
        .any(|name| fields.get(*name).is_some_and(says_something));
    match fields.get("target_modules") {
        None | Some(Value::Null | Value::String(_)) => Ok(None),
        Some(Value::Array(names)) => {
            let names = names.iter().map(|name| name.as_str().map(str::to_owned).ok_or_else(wrong));
            let names = names.collect::<Result<Vec<_>, _>>()?;
            Ok((!some_layers).then_some(names))
        }
        Some(_) => Err(wrong()),
    }
}
