//! How an engine is to be started.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use tidemill_kernels::DType;

use crate::{
    adapters::LoraConfig, error::LoadError, explain::EndedLife, ids::TenantId, model::files::ModelSource,
    scheduler::Policy,
};

/// What a count among the options may be at most: more is a slip of the keyboard.
const MAX_COUNT: usize = 1 << 30;

/// Arithmetic of the matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ComputeDtype {
    /// `bfloat16` for checkpoints in bfloat16 and on a GPU, `float32` for all others.
    #[default]
    Auto,
    /// Activations are rounded to bfloat16 before each product; sums are float32.
    Bf16,
    /// Everything in float32.
    F32,
}

/// What the matrices of linear layers become as they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// F8E4M3 with a scale for each row.
    Fp8,
    /// Signed bytes with a scale for each 128 columns of a row, or fewer.
    Int8,
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU, or the CPU where there is none that can be used.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU with this ordinal.
    Cuda(usize),
}

/// How to start an engine. [`EngineConfig::new`] fills in the defaults.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// What to load.
    pub source: ModelSource,
    /// The name clients use; `None` takes the folder's name.
    pub served_model_name: Option<String>,
    /// A chat template that replaces the model's own.
    pub chat_template: Option<PathBuf>,
    /// The two tokens whose logits score a pair of texts, the negative one first, in rerankers that answer with yes or no; `None`: what the
    /// model folder says.
    pub classifier_from_token: Option<[String; 2]>,
    /// Token ids in, token ids out: no tokenizer is loaded, and what is about text is refused.
    pub skip_tokenizer_init: bool,
    /// Arithmetic of the matrix products.
    pub dtype: ComputeDtype,
    /// Quantises the matrices of linear layers as they are loaded; embeddings, norms, routers and the output layer stay as they are.
    pub quantization: Option<Quantization>,
    /// Storage of keys and values; `None` follows `dtype`.
    pub kv_cache_dtype: Option<DType>,
    /// Tokens of prompt and completion together; `None` takes the model's own, or what the KV cache holds.
    pub max_model_len: Option<usize>,
    /// Rows of the batch; `None` takes 64 on a CPU, 256 on a GPU.
    pub max_num_seqs: Option<usize>,
    /// Tokens per step; `None` takes 512 on a CPU, 2048 on a GPU.
    pub max_num_batched_tokens: Option<usize>,
    /// Who is served when, and what is refused.
    pub scheduling: SchedulingConfig,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Bytes for keys and values; `None` takes what `max_num_seqs` full contexts need: on a CPU at most 2 GiB, on a GPU
    /// at most what `gpu_memory_utilization` leaves.
    pub kv_cache_memory: Option<usize>,
    /// Bytes of host memory for blocks of keys and values that leave the KV cache for a while; 0 keeps none. On a GPU they are
    /// page-locked.
    pub swap_space: usize,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Share of a GPU's memory that this engine may take, in (0, 1].
    pub gpu_memory_utilization: f64,
    /// Launch every kernel by itself on a GPU, without CUDA graphs.
    pub enforce_eager: bool,
    /// Folder for kernels that were compiled on this machine; `None` compiles them at every start. Only used by builds without
    /// precompiled kernels.
    pub kernel_cache: Option<PathBuf>,
    /// Threads of the CPU backend; `None` takes one per core.
    pub threads: Option<usize>,
    /// Plans a step while the one before it runs; the same tokens come out either way. `None` does so on a GPU, which would wait for
    /// its host otherwise; a CPU gains nothing by it.
    pub look_ahead: Option<bool>,
    /// Gets the life of every request that has ended. What finds it full is lost and counted.
    pub lives: Option<async_channel::Sender<EndedLife>>,
    /// Adapters that requests can name; `None`: there is no room for any.
    pub lora: Option<LoraConfig>,
}

impl EngineConfig {
    /// The defaults for a model.
    pub fn new(source: ModelSource) -> Self {
        Self {
            source,
            served_model_name: None,
            chat_template: None,
            classifier_from_token: None,
            skip_tokenizer_init: false,
            dtype: ComputeDtype::Auto,
            quantization: None,
            kv_cache_dtype: None,
            max_model_len: None,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            scheduling: SchedulingConfig::default(),
            block_size: 16,
            kv_cache_memory: None,
            swap_space: 0,
            device: DeviceChoice::Auto,
            gpu_memory_utilization: 0.9,
            enforce_eager: false,
            kernel_cache: None,
            threads: None,
            look_ahead: None,
            lives: None,
            lora: None,
        }
    }
}

/// Who is served when, and what is refused.
#[derive(Debug, Clone)]
pub struct SchedulingConfig {
    /// Order of the queue.
    pub policy: Policy,
    /// Shares of tenants under [`Policy::Fair`]; whoever is not named has 1.
    pub tenant_weights: BTreeMap<TenantId, u32>,
    /// Keep the blocks of ended requests for others with the same beginning.
    pub enable_prefix_caching: bool,
    /// Report what the prefix cache stores and drops, to [`crate::EngineHandle::watch_kv`].
    pub enable_kv_cache_events: bool,
    /// Prompts with more tokens to compute than this are long: only the oldest of them is sure of its part of a step, and of no more than this, while
    /// others want to be read. `None` takes half of `max_num_batched_tokens`.
    pub long_prefill_token_threshold: Option<usize>,
    /// The inter-token latency to be kept while prompts are read; prompts get as much of a step as that leaves.
    pub target_itl: Option<Duration>,
    /// Requests that may wait for a row.
    pub max_num_queued_reqs: usize,
    /// Prompt tokens of the requests that may wait for a row.
    pub max_num_queued_tokens: Option<usize>,
    /// What a request may wait for a row; one that would or does wait longer is refused.
    pub max_queue_time: Option<Duration>,
    /// Tokens that a stream may hold unread before its sequences are parked.
    pub max_stream_buffer: usize,
    /// What a parked stream may stay without being read from before its request ends.
    pub slow_reader_timeout: Duration,
}

impl SchedulingConfig {
    /// Checks the options, also against the sizes of a step.
    ///
    /// # Errors
    /// The option that is out of range or contradicts another.
    pub(crate) fn check(&self, max_num_seqs: usize, max_num_batched_tokens: usize) -> Result<(), LoadError> {
        let counts = [
            ("--max-num-queued-reqs", Some(self.max_num_queued_reqs)),
            ("--max-num-queued-tokens", self.max_num_queued_tokens),
            ("--max-stream-buffer", Some(self.max_stream_buffer)),
            ("--long-prefill-token-threshold", self.long_prefill_token_threshold),
        ];
        for (option, count) in counts.into_iter().filter_map(|(option, count)| Some((option, count?))) {
            if !(1..=MAX_COUNT).contains(&count) {
                return refuse(option, format!("{count} is not in [1, {MAX_COUNT}]"));
            }
        }
        let durations = [
            ("--target-itl-ms", self.target_itl),
            ("--max-queue-time", self.max_queue_time),
            ("--slow-reader-timeout", Some(self.slow_reader_timeout)),
        ];
        if let Some((option, _)) = durations.into_iter().find(|(_, time)| *time == Some(Duration::ZERO)) {
            return refuse(option, "must be over 0".into());
        }
        if let Some((tenant, _)) = self.tenant_weights.iter().find(|(_, weight)| **weight == 0) {
            return refuse("--tenant-weight", format!("{tenant}=0: a weight is at least 1"));
        }
        if !self.tenant_weights.is_empty() && self.policy != Policy::Fair {
            return refuse("--tenant-weight", "counts only with --scheduling-policy fair".into());
        }
        if self.enable_kv_cache_events && !self.enable_prefix_caching {
            let detail =
                "there is nothing to report without a prefix cache; leave --no-enable-prefix-caching out";
            return refuse("--enable-kv-cache-events", detail.into());
        }
        if max_num_batched_tokens < max_num_seqs {
            let detail = format!(
                "{max_num_batched_tokens} tokens per step are too few for the {max_num_seqs} rows of --max-num-seqs, each of which \
                 may need one; raise this or lower that"
            );
            return refuse("--max-num-batched-tokens", detail);
        }
        Ok(())
    }
}

fn refuse(option: &'static str, detail: String) -> Result<(), LoadError> {
    Err(LoadError::Option { option, detail })
}

impl Default for SchedulingConfig {
    fn default() -> Self {
        Self {
            policy: Policy::Fcfs,
            tenant_weights: BTreeMap::new(),
            enable_prefix_caching: true,
            enable_kv_cache_events: false,
            long_prefill_token_threshold: None,
            target_itl: None,
            max_num_queued_reqs: 1024,
            max_num_queued_tokens: None,
            max_queue_time: None,
            max_stream_buffer: 1024,
            slow_reader_timeout: Duration::from_secs(60),
        }
    }
}
