//! What a model folder holds, what it needs and what would fail, without reading a weight.
//!
//! Everything is found by the code that serves, so the two cannot disagree: an error here is the error there, word for word.

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;
use tidemill_kernels::{DType, cuda::gpu};

use crate::{
    config::EngineConfig,
    device::{self, CPU_DEFAULTS, CPU_KV_BYTES},
    error::LoadError,
    model::{
        checkpoint::Checkpoint,
        files::{ModelFiles, ModelSource},
        generation_config::GenerationDefaults,
        heads::embedding_info,
        spec::{LayerSpec, MlpSpec, ModelSpec},
    },
    sizes::Asked,
    text::TextModel,
};

/// Contexts for which it is said how many fit.
const CONTEXTS: [usize; 6] = [2048, 8192, 32_768, 131_072, 262_144, 1_048_576];

/// What was found. What could not be found out is absent, and `problems` says why.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Inspection {
    /// What was inspected.
    pub path: String,
    /// As in `config.json`.
    pub architecture: Option<String>,
    /// Elements of all tensors.
    pub parameters: Option<u64>,
    /// Elements that one token is computed with: fewer where it goes to some of the experts alone.
    pub active_parameters: Option<u64>,
    /// Tensors by the type of their elements.
    pub weights: Vec<WeightKind>,
    /// Bytes of the tensors that the model is made of.
    pub weight_bytes: Option<u64>,
    /// Bytes of all tensors in the files; what the model does not ask for is not read.
    pub file_bytes: Option<u64>,
    /// Tokens of prompt and completion together.
    pub max_model_len: Option<usize>,
    /// Token ids are below this.
    pub vocab_size: Option<usize>,
    /// Bytes of keys and values of one token, by the type they are kept in.
    pub kv_bytes_per_token: BTreeMap<&'static str, u64>,
    /// What fits on this machine.
    pub devices: Vec<DeviceFit>,
    /// What turns text to ids.
    pub tokenizer: Option<TokenizerFacts>,
    /// Where the chat template stands; absent where there is none.
    pub chat_template: Option<String>,
    /// Sampling defaults.
    pub generation: Option<GenerationFacts>,
    /// Which hidden states make an embedding.
    pub pooling: Option<&'static str>,
    /// Whether it gives embeddings and nothing else.
    pub is_only_embedding: bool,
    /// What fails when it is served, in the words of that failure. Empty for a model that can be served.
    pub problems: Vec<String>,
}

/// Tensors whose elements have one type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WeightKind {
    /// As the file names it.
    pub dtype: String,
    /// How many.
    pub tensors: u64,
    /// Their elements.
    pub parameters: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What fits on a device.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceFit {
    /// As `--device` takes it.
    pub device: String,
    /// In words.
    pub name: String,
    /// Bytes that can be had: on a CPU what the system has available, on a GPU its memory times `--gpu-memory-utilization`.
    pub memory_bytes: u64,
    /// Bytes of the weights there.
    pub weight_bytes: u64,
    /// The type of keys and values by default.
    pub kv_cache_dtype: &'static str,
    /// Tokens whose keys and values fit beside the weights, all sequences together. On a GPU activations, which only loading measures, take of it.
    pub kv_tokens: u64,
    /// Tokens that fit by default: on a CPU `--kv-cache-memory` bounds them.
    pub default_kv_tokens: u64,
    /// How many sequences of a length fit at once, for some lengths up to the model's longest.
    pub sequences: Vec<ContextFit>,
}

/// Sequences of one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ContextFit {
    /// Tokens of each.
    pub context: usize,
    /// How many fit at once; 0 where not even one does.
    pub sequences: u64,
}

/// What turns text to ids.
#[derive(Debug, Clone, Serialize)]
pub struct TokenizerFacts {
    /// What it was made from.
    pub kind: String,
    /// Tokens that stand for no text.
    pub special_tokens: usize,
}

/// Sampling defaults of the model.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GenerationFacts {
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// Over 0.
    pub repetition_penalty: Option<f32>,
    /// Tokens to generate.
    pub max_new_tokens: Option<u32>,
}

/// Inspects a model as `config` would have it served. No weight is read.
pub fn inspect(config: &EngineConfig) -> Inspection {
    let mut found = Inspection { path: shown(&config.source), ..Inspection::default() };
    if let ModelSource::Dir(path) = &config.source
        && path.extension().is_some_and(|extension| extension == "safetensors")
        && path.is_file()
    {
        if let Some(checkpoint) = found.note(Checkpoint::open_path(path)) {
            found.checkpoint(&checkpoint);
        }
        return found;
    }
    let Some(mut files) = found.note(ModelFiles::open(&config.source)) else { return found };
    if let Some(path) = &config.chat_template {
        files = files.with_chat_template(path);
    }
    let spec = found.note(ModelSpec::load(&files));
    let checkpoint = found.note(Checkpoint::open(&files));
    if let Some(checkpoint) = &checkpoint {
        found.checkpoint(checkpoint);
    }
    let Some(mut spec) = spec else { return found };
    if let Some(checkpoint) = &checkpoint {
        spec.follow_names(|name| checkpoint.contains(name));
    }
    found.spec(&files, &spec, config);
    if let Some(checkpoint) = &checkpoint
        && found.note(checkpoint.verify(&spec)).is_some()
    {
        found.fit(config, &spec, checkpoint);
    }
    found
}

fn shown(source: &ModelSource) -> String {
    match source {
        ModelSource::Builtin => "builtin".to_owned(),
        ModelSource::Dir(path) => path.display().to_string(),
    }
}

impl Inspection {
    /// The value, or `None` and a problem more.
    fn note<T>(&mut self, result: Result<T, LoadError>) -> Option<T> {
        result.map_err(|error| self.problems.push(error.to_string())).ok()
    }

    fn checkpoint(&mut self, checkpoint: &Checkpoint) {
        self.parameters = Some(checkpoint.num_parameters());
        self.file_bytes = Some(checkpoint.total_bytes());
        self.weights = checkpoint.kinds();
    }

    fn spec(&mut self, files: &ModelFiles, spec: &ModelSpec, config: &EngineConfig) {
        self.architecture = Some(spec.architecture.to_owned());
        let all = parameters(spec);
        self.parameters = Some(all);
        self.active_parameters = Some(all.saturating_sub(idle_parameters(spec)));
        self.max_model_len = Some(config.max_model_len.unwrap_or(spec.max_position_embeddings));
        self.vocab_size = Some(spec.vocab_size);
        if let Some(defaults) = self.note(GenerationDefaults::load(files, spec)) {
            self.generation = Some(GenerationFacts {
                eos_token_ids: defaults.eos.iter().map(|id| id.0).collect(),
                temperature: defaults.temperature,
                top_k: defaults.top_k,
                top_p: defaults.top_p,
                repetition_penalty: defaults.repetition_penalty,
                max_new_tokens: defaults.max_new_tokens,
            });
        }
        if let Some(embedding) = self.note(embedding_info(files, spec)) {
            self.pooling = Some(embedding.pooling.name());
            self.is_only_embedding = embedding.is_only_output;
        }
        if config.skip_tokenizer_init {
            return;
        }
        if let Some(text) = self.note(TextModel::load(files, spec)) {
            let special_tokens = text.special_tokens().len();
            self.tokenizer =
                text.tokenizer_kind().map(|kind| TokenizerFacts { kind: kind.to_string(), special_tokens });
            self.chat_template = text.has_chat_template().then(|| match files.chat_template() {
                Ok(Some((path, _))) => path.display().to_string(),
                _ => "tokenizer_config.json".to_owned(),
            });
        }
    }

    fn fit(&mut self, config: &EngineConfig, spec: &ModelSpec, checkpoint: &Checkpoint) {
        let needed: u64 = checkpoint.needed(spec).iter().map(|slice| slice.len() as u64).sum();
        self.weight_bytes = Some(needed);
        let Some(asked) = self.note(Asked::check(config, spec, CPU_DEFAULTS)) else { return };
        let per_token = |dtype| asked.kv_shape(spec, dtype, 1).block_bytes() as u64 / asked.block_size as u64;
        for dtype in [DType::F32, DType::Bf16] {
            self.kv_bytes_per_token.insert(device::name(dtype), per_token(dtype));
        }
        let Some(stored) = self.note(device::stored_dtype(spec, checkpoint)) else { return };
        let lengths =
            CONTEXTS.into_iter().filter(|&length| length < asked.max_model_len).chain([asked.max_model_len]);
        let lengths: Vec<usize> = lengths.collect();
        let fit = |device: String, name: String, memory: u64, (weights, kv): (u64, DType), bound: u64| {
            let kv_tokens = memory.saturating_sub(weights) / per_token(kv).max(1);
            DeviceFit {
                device,
                name,
                memory_bytes: memory,
                weight_bytes: weights,
                kv_cache_dtype: device::name(kv),
                kv_tokens,
                default_kv_tokens: kv_tokens.min(bound / per_token(kv).max(1)),
                sequences: lengths
                    .iter()
                    .map(|&context| ContextFit { context, sequences: kv_tokens / context.max(1) as u64 })
                    .collect(),
            }
        };
        let cpu_kv =
            config.kv_cache_dtype.unwrap_or(if stored == DType::Bf16 { DType::Bf16 } else { DType::F32 });
        let bound = config.kv_cache_memory.unwrap_or(CPU_KV_BYTES) as u64;
        let memory = available_memory().unwrap_or(0);
        self.devices.push(fit(
            "cpu".to_owned(),
            "this machine's CPU".to_owned(),
            memory,
            (needed, cpu_kv),
            bound,
        ));
        // A GPU keeps all weights in bfloat16.
        let on_gpu = if stored == DType::F32 { needed / 2 } else { needed };
        for (number, info) in gpu::devices().unwrap_or_default().into_iter().enumerate() {
            let memory = (info.total_memory as f64 * config.gpu_memory_utilization) as u64;
            let fit = fit(format!("cuda:{number}"), info.name, memory, (on_gpu, DType::Bf16), u64::MAX);
            self.devices.push(fit);
        }
    }
}

/// Elements of what the specification asks for, as if nothing were quantised.
fn parameters(spec: &ModelSpec) -> u64 {
    let count =
        |shape: &[usize]| shape.iter().fold(1_u64, |product, &extent| product.saturating_mul(extent as u64));
    spec.tensors().iter().fold(0, |sum: u64, tensor| sum.saturating_add(count(&tensor.shape)))
}

/// Elements of the experts that a token does not go to: each has three projections, and maybe their biases.
fn idle_parameters(spec: &ModelSpec) -> u64 {
    let idle = |layer: &LayerSpec| {
        let MlpSpec::Moe(moe) = &layer.mlp else { return 0 };
        let (hidden, width) = (spec.hidden_size as u64, moe.width as u64);
        let biases = if moe.bias { hidden + 2 * width } else { 0 };
        let expert = hidden.saturating_mul(width).saturating_mul(3).saturating_add(biases);
        expert.saturating_mul(moe.routing.experts.saturating_sub(moe.routing.top_k) as u64)
    };
    spec.layers.iter().map(idle).fold(0, u64::saturating_add)
}

/// Memory that the system can give without taking any from others, by its own estimate; `None` where it has none.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string(Path::new("/proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
