//! What the files of byte-level tokenizers do not say: how a family splits texts before its merges apply.

use serde_json::{Value, json};

use super::added::FolderTokens;

/// Llama 3; the pattern of OpenAI's `cl100k_base`.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 1 to 3: digits stand alone.
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-OSS; the pattern of OpenAI's `o200k_base`.
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A family of byte-level tokenizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Llama3,
    Qwen,
    GptOss,
    Gpt2,
    Roberta,
}

/// Beginnings of the names of classes and model types, in lower case.
const NAMES: [(&str, Family); 13] = [
    ("llama", Family::Llama3),
    ("qwen", Family::Qwen),
    ("gpt_oss", Family::GptOss),
    ("gptoss", Family::GptOss),
    ("gptneox", Family::Gpt2),
    ("gpt_neox", Family::Gpt2),
    ("gpt2", Family::Gpt2),
    ("codegen", Family::Gpt2),
    ("starcoder2", Family::Gpt2),
    ("granite", Family::Gpt2),
    ("olmo", Family::Gpt2),
    ("xlm", Family::Roberta),
    ("roberta", Family::Roberta),
];

impl Family {
    /// The family of a folder: by the class of its tokenizer, or else by the model's type. XLM-R's own files are no byte-level ones.
    pub(super) fn of(folder: &FolderTokens, model_type: Option<&str>) -> Option<Self> {
        let name = folder.class.as_deref().or(model_type)?.to_lowercase();
        let found = NAMES.iter().find(|(start, _)| name.starts_with(start) && !name.starts_with("xlm"));
        found.map(|&(_, family)| family)
    }

    /// Families whose files are lists of ranks.
    pub(super) fn has_ranks(self) -> bool {
        matches!(self, Self::Llama3 | Self::Qwen | Self::GptOss)
    }

    pub(super) fn normalizer(self) -> Option<Value> {
        (self == Self::Qwen).then(|| json!({"type": "NFC"}))
    }

    pub(super) fn pre_tokenizer(self, add_prefix_space: bool) -> Value {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex});
        let pattern = match self {
            Self::Llama3 => LLAMA3,
            Self::Qwen => QWEN,
            Self::GptOss => O200K,
            Self::Gpt2 | Self::Roberta => return bytes(true),
        };
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            bytes(false),
        ]})
    }
}
