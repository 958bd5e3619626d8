//! Starting and stopping an engine.

use std::{
    panic::{self, AssertUnwindSafe},
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize},
    },
    thread,
};

use crossbeam_channel::unbounded;
use tidemill_kernels::{
    DType,
    cpu::{Compute, CpuConfig, CpuOps},
    ops::KvShape,
};

use crate::{
    core::{Command, Core},
    error::{LoadError, StopReason},
    handle::{EngineHandle, Shared},
    info::ModelInfo,
    kv::BlockPool,
    model::{
        checkpoint::Checkpoint,
        decoder::{Decoder, DecoderLimits},
        files::{ModelFiles, ModelSource},
        generation_config::GenerationDefaults,
        spec::ModelSpec,
    },
    request::Validator,
    runner::{DecoderRunner, RunnerThread, panic_message},
    scheduler::{Limits, Scheduler},
    stats::SharedStats,
    text::TextModel,
};

/// Arithmetic of the matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ComputeDtype {
    /// `bfloat16` for checkpoints in bfloat16, `float32` for all others.
    #[default]
    Auto,
    /// Activations are rounded to bfloat16 before each product; sums are float32.
    Bf16,
    /// Everything in float32.
    F32,
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
    /// Arithmetic of the matrix products.
    pub dtype: ComputeDtype,
    /// Storage of keys and values; `None` follows `dtype`.
    pub kv_cache_dtype: Option<DType>,
    /// Tokens of prompt and completion together; `None` takes the model's own, or what the KV cache holds.
    pub max_model_len: Option<usize>,
    /// Rows of the batch.
    pub max_num_seqs: usize,
    /// Tokens per step.
    pub max_num_batched_tokens: usize,
    /// Requests that may wait for a row.
    pub max_num_queued_reqs: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Bytes for keys and values; `None` takes what `max_num_seqs` full contexts need, at most 2 GiB.
    pub kv_cache_memory: Option<usize>,
    /// Threads of the CPU backend; `None` takes one per core.
    pub threads: Option<usize>,
    /// Plans a step while the one before it runs. The same tokens come out either way.
    pub look_ahead: bool,
}

impl EngineConfig {
    /// The defaults for a model.
    pub fn new(source: ModelSource) -> Self {
        Self {
            source,
            served_model_name: None,
            chat_template: None,
            dtype: ComputeDtype::Auto,
            kv_cache_dtype: None,
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_num_queued_reqs: 1024,
            block_size: 16,
            kv_cache_memory: None,
            threads: None,
            look_ahead: true,
        }
    }
}

/// What loading has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many of so many layers are loaded.
    Layers {
        /// Done.
        done: usize,
        /// In all.
        total: usize,
    },
}

/// What an engine is told besides its runner and its model.
#[derive(Debug, Clone, Copy)]
pub struct EngineOptions {
    /// Requests that may wait for a row.
    pub max_num_queued_reqs: usize,
    /// Plans a step while the one before it runs.
    pub look_ahead: bool,
}

/// A running engine. Dropping it shuts it down: whatever is live fails with `EngineStopped`.
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    thread: Option<thread::JoinHandle<()>>,
}

/// Default bound of the KV cache in bytes.
const DEFAULT_KV_BYTES: usize = 2 << 30;

impl Engine {
    /// Loads a model and starts the engine and runner threads. Blocks until it is ready for requests.
    ///
    /// # Errors
    /// Whatever is wrong with the model or the options.
    pub fn start(
        config: EngineConfig,
        mut progress: impl FnMut(Progress) + Send + 'static,
    ) -> Result<Self, LoadError> {
        let mut files = ModelFiles::open(&config.source)?;
        if let Some(path) = &config.chat_template {
            files = files.with_chat_template(path);
        }
        let spec = ModelSpec::load(&files)?;
        let defaults = GenerationDefaults::load(&files, &spec)?;
        let text = Arc::new(TextModel::load(&files, &spec)?);
        let checkpoint = Checkpoint::open(&files)?;
        checkpoint.verify(&spec)?;
        let embedding =
            checkpoint.tensor("model.embed_tokens.weight", &[spec.vocab_size, spec.hidden_size])?;
        let compute = match (config.dtype, embedding.dtype) {
            (ComputeDtype::Bf16, _) | (ComputeDtype::Auto, DType::Bf16) => Compute::Bf16,
            (ComputeDtype::F32, _) | (ComputeDtype::Auto, _) => Compute::F32,
        };
        let sizes = Sizes::choose(&config, &spec, compute)?;
        let num_parameters = checkpoint.num_parameters();
        // The embedding is a look-up, unless it is the output matrix too.
        let looked_up = if spec.tie_word_embeddings { 0 } else { embedding.data.len() as u64 };
        let weight_bytes_per_step = checkpoint.total_bytes().saturating_sub(looked_up);
        let (threads, runner_spec) = (config.threads, spec.clone());
        let (runner, device) = RunnerThread::start(move || {
            let ops = CpuOps::new(CpuConfig { compute, isa: None, threads })?;
            let device = format!("cpu ({}, {} threads)", ops.isa(), ops.threads());
            let limits = DecoderLimits {
                max_num_batched_tokens: sizes.max_num_batched_tokens,
                max_model_len: sizes.max_model_len,
                kv: sizes.kv,
            };
            let total = runner_spec.num_layers;
            let mut decoder = Decoder::load(ops, &runner_spec, &checkpoint, limits, |done| {
                progress(Progress::Layers { done, total });
            })?;
            decoder.warm_up()?;
            Ok((DecoderRunner::new(decoder, sizes.kv.block_size), device))
        })?;
        let info = ModelInfo {
            served_model_name: config.served_model_name.unwrap_or_else(|| model_name(&config.source)),
            architecture: spec.architecture.name().to_owned(),
            num_parameters,
            weight_bytes_per_step,
            vocab_size: spec.vocab_size,
            max_model_len: sizes.max_model_len,
            device,
            dtype: if compute == Compute::Bf16 { "bfloat16" } else { "float32" },
            kv_cache_dtype: if sizes.kv.dtype == DType::Bf16 { "bfloat16" } else { "float32" },
            block_size: sizes.kv.block_size,
            num_kv_blocks: sizes.kv.num_blocks,
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            eos_token_ids: defaults.eos.clone(),
            has_chat_template: text.has_chat_template(),
            defaults,
        };
        let options =
            EngineOptions { max_num_queued_reqs: config.max_num_queued_reqs, look_ahead: config.look_ahead };
        Self::with_runner(runner, info, text, options)
    }

    /// Starts the engine thread over a runner: the real one, or one that a test brings. `info` must describe it.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn with_runner(
        runner: RunnerThread,
        info: ModelInfo,
        text: Arc<TextModel>,
        options: EngineOptions,
    ) -> Result<Self, LoadError> {
        let pool = BlockPool::new(info.num_kv_blocks, info.block_size);
        let stats = Arc::new(SharedStats::new(pool.clone()));
        let limits =
            Limits { max_num_seqs: info.max_num_seqs, max_num_batched_tokens: info.max_num_batched_tokens };
        let (commands_tx, commands) = unbounded();
        let (alive_guard, alive) = async_channel::bounded(1);
        let shared = Arc::new(Shared {
            validator: Validator {
                text: text.clone(),
                defaults: info.defaults.clone(),
                served_model_name: info.served_model_name.clone(),
                vocab_size: info.vocab_size,
                max_model_len: info.max_model_len,
                kv_capacity_tokens: info.num_kv_blocks * info.block_size,
                eos_token_ids: info.eos_token_ids.clone(),
            },
            info,
            text,
            stats: stats.clone(),
            max_num_queued_reqs: options.max_num_queued_reqs,
            queued: Arc::new(AtomicUsize::new(0)),
            next_ticket: AtomicU64::new(0),
            stopped: OnceLock::new(),
            alive,
        });
        let scheduler = Scheduler::new(limits, pool);
        let mut core = Core::new(scheduler, runner, commands, stats, options.look_ahead);
        let thread_shared = shared.clone();
        let body = move || {
            let ended = panic::catch_unwind(AssertUnwindSafe(|| core.run()));
            let reason = ended.unwrap_or_else(|payload| {
                let said = panic_message(payload.as_ref());
                StopReason::Stopped(format!("the engine thread panicked: {said}"))
            });
            tracing::debug!(%reason, "the engine thread ends");
            // Set before the channel closes, so that whoever waits on it finds the reason.
            thread_shared.stopped.get_or_init(|| reason);
            drop(alive_guard);
            // Waits for the runner, which may take long: everybody has been told.
            drop(core);
        };
        let spawned = thread::Builder::new().name("tidemill-engine".into()).spawn(body);
        let thread = spawned.map_err(|source| LoadError::Option {
            option: "engine thread",
            detail: format!("cannot be started: {source}"),
        })?;
        Ok(Self { handle: EngineHandle { commands: commands_tx, shared }, thread: Some(thread) })
    }

    /// A handle to this engine.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Fails only when the thread has ended already.
        drop(self.handle.commands.send(Command::Shutdown));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// A model's name when none is given: its folder's.
fn model_name(source: &ModelSource) -> String {
    match source {
        ModelSource::Builtin => "tidemill-demo".into(),
        ModelSource::Dir(path) => {
            let path = path.canonicalize().unwrap_or_else(|_| path.clone());
            path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
        }
    }
}

/// Sizes that depend on model, options and memory together.
#[derive(Clone, Copy)]
struct Sizes {
    kv: KvShape,
    max_model_len: usize,
    max_num_batched_tokens: usize,
}

impl Sizes {
    fn choose(config: &EngineConfig, spec: &ModelSpec, compute: Compute) -> Result<Self, LoadError> {
        let option = |option, detail: String| Err(LoadError::Option { option, detail });
        for (name, value) in [
            ("--max-num-seqs", config.max_num_seqs),
            ("--max-num-batched-tokens", config.max_num_batched_tokens),
            ("--block-size", config.block_size),
            ("--max-num-queued-reqs", config.max_num_queued_reqs),
        ] {
            if value == 0 || value > 1 << 20 {
                return option(name, format!("{value} is not in [1, {}]", 1 << 20));
            }
        }
        let longest = spec.max_position_embeddings;
        let asked = config.max_model_len.unwrap_or(longest);
        if !(2..=longest).contains(&asked) {
            return option(
                "--max-model-len",
                format!("{asked} is not in [2, {longest}], what the model was made for"),
            );
        }
        let default_dtype = if compute == Compute::Bf16 { DType::Bf16 } else { DType::F32 };
        let mut kv = KvShape {
            num_layers: spec.num_layers,
            num_blocks: 0,
            block_size: config.block_size,
            num_kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            dtype: config.kv_cache_dtype.unwrap_or(default_dtype),
        };
        let block_bytes = kv.block_bytes();
        let per_seq = asked.div_ceil(config.block_size);
        let full = per_seq.saturating_mul(config.max_num_seqs);
        let budget = config.kv_cache_memory.unwrap_or(DEFAULT_KV_BYTES);
        kv.num_blocks = (budget / block_bytes).min(full);
        if kv.num_blocks == 0 {
            return option(
                "--kv-cache-memory",
                format!("{budget} bytes hold no block of {block_bytes} bytes"),
            );
        }
        let capacity = kv.num_blocks * config.block_size;
        if config.max_model_len.is_some() && asked > capacity {
            let detail = format!(
                "{asked} tokens need {} bytes of KV cache, but only {capacity} tokens fit; raise --kv-cache-memory",
                per_seq * block_bytes
            );
            return option("--max-model-len", detail);
        }
        if asked > capacity {
            tracing::warn!(
                capacity,
                model = longest,
                "the KV cache holds less than the model's context; max_model_len is lowered"
            );
        }
        Ok(Self {
            kv,
            max_model_len: asked.min(capacity),
            max_num_batched_tokens: config.max_num_batched_tokens,
        })
    }
}
