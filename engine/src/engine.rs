//! Starting and stopping an engine.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::{Arc, atomic::AtomicU64},
    thread,
};

use crossbeam_channel::unbounded;
use tidemill_kernels::{DType, cuda::driver::Driver};

use crate::{
    adapters::{Adapters, LoraConfig},
    config::{EngineConfig, SchedulingConfig},
    core::{Command, Core, Parts, Settings},
    device::{self, Model},
    error::{LoadError, StopReason},
    explain::EndedLife,
    handle::{EngineHandle, Shared},
    heads::Heads,
    info::ModelInfo,
    kv::{BlockPool, CacheConfig},
    model::{
        checkpoint::Checkpoint,
        files::{ModelFiles, ModelSource},
        generation_config::GenerationDefaults,
        heads::HeadSpec,
        lora::Sites,
        prefetch::{Loaded, Prefetch},
        spec::ModelSpec,
    },
    queue::Queue,
    request::Validator,
    runner::{RunnerThread, panic_message},
    scheduler::{Limits, SchedulerConfig},
    stats::SharedStats,
    stopped::Stopped,
    swap::SwapFacts,
    text::{TextModel, grammar::Forms},
};

/// What loading has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many of so many layers are set up.
    Layers {
        /// Done.
        done: usize,
        /// In all.
        total: usize,
    },
    /// So many of so many bytes of weights are read.
    Bytes {
        /// Done.
        done: u64,
        /// In all.
        total: u64,
    },
}

/// What an engine is told besides its runner and its model.
#[derive(Debug, Clone, Default)]
pub struct EngineOptions {
    /// Who is served when, and what is refused.
    pub scheduling: SchedulingConfig,
    /// Plans a step while the one before it runs.
    pub look_ahead: bool,
    /// Gets the life of every request that has ended. What finds it full is lost and counted.
    pub lives: Option<async_channel::Sender<EndedLife>>,
    /// What stands around a model that embeds or scores.
    pub heads: Heads,
    /// Blocks of host memory that the runner has, for what the prefix cache gives up.
    pub host_blocks: usize,
    /// The adapters that requests can name. The runner has as many slots as the batch may have adapters.
    pub adapters: Arc<Adapters>,
}

/// A running engine. Dropping it shuts it down: whatever is live fails with `EngineStopped`.
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    thread: Option<thread::JoinHandle<()>>,
}

impl Engine {
    /// Loads a model and starts the engine and runner threads. Blocks until it is ready for requests.
    ///
    /// # Errors
    /// Whatever is wrong with the model or the options.
    pub fn start(
        config: EngineConfig,
        progress: impl FnMut(Progress) + Send + 'static,
    ) -> Result<Self, LoadError> {
        let driver = device::choose(&config)?;
        Self::start_on(driver, config, progress)
    }

    /// As [`Engine::start`], on a GPU that is open already, or on the CPU; `config.device` is not asked.
    ///
    /// # Errors
    /// Whatever is wrong with the model or the options.
    pub fn start_on(
        driver: Option<Arc<dyn Driver>>,
        config: EngineConfig,
        mut progress: impl FnMut(Progress) + Send + 'static,
    ) -> Result<Self, LoadError> {
        if config.swap_space > 0 && !config.scheduling.enable_prefix_caching {
            return Err(LoadError::Option {
                option: "--swap-space",
                detail: "what is swapped out is found through the prefix cache; leave --no-enable-prefix-caching out"
                    .into(),
            });
        }
        let mut files = ModelFiles::open(&config.source)?;
        if let Some(path) = &config.chat_template {
            if config.skip_tokenizer_init {
                let detail = "conversations become text, which --skip-tokenizer-init leaves out; leave out one of the two".into();
                return Err(LoadError::Option { option: "--chat-template", detail });
            }
            files = files.with_chat_template(path);
        }
        let mut spec = ModelSpec::load(&files)?;
        let defaults = GenerationDefaults::load(&files, &spec)?;
        let head_spec = HeadSpec::read(&files, &spec, config.classifier_from_token.as_ref())?;
        let text = match config.skip_tokenizer_init {
            true => TextModel::without_tokenizer(&files, &spec),
            false => TextModel::load(&files, &spec)?,
        };
        let text = Arc::new(text);
        let checkpoint = Checkpoint::open(&files)?;
        spec.follow_names(|name| checkpoint.contains(name));
        checkpoint.verify(&spec)?;
        let heads = head_spec.load(&files, &spec, &checkpoint, &text)?;
        let num_parameters = checkpoint.num_parameters();
        // The embedding is a look-up, unless it is the output matrix too.
        let (table_bytes, table_dtype) = checkpoint.stored(&spec.embedding_name()).unwrap_or_default();
        let is_output = spec.tie_word_embeddings && !spec.is_headless();
        let looked_up = if is_output { 0 } else { table_bytes as u64 };
        // A GPU keeps all weights in bfloat16.
        let halved = driver.is_some() && table_dtype == Some(DType::F32);
        let weight_bytes_per_step =
            checkpoint.total_bytes().saturating_sub(looked_up) / if halved { 2 } else { 1 };
        let name = config.served_model_name.clone().unwrap_or_else(|| model_name(&config.source));
        let adapters = adapters(&config, &spec, &name)?;
        let look_ahead = config.look_ahead.unwrap_or(driver.is_some());
        let (runner_config, runner_spec) = (config.clone(), spec.clone());
        let (runner, facts) = RunnerThread::start(move || {
            let total = runner_spec.layers.len();
            let model = Model { config: &runner_config, spec: &runner_spec, checkpoint: &checkpoint };
            let prefetch = Prefetch::start(checkpoint.needed(&runner_spec), checkpoint.total_bytes());
            let layers = |done_layers| {
                progress(Progress::Layers { done: done_layers, total });
                let (done, total) = prefetch.progress();
                progress(Progress::Bytes { done, total });
            };
            let built = match driver {
                Some(driver) => model.on_cuda(driver, layers)?,
                None => model.on_cpu(layers)?,
            };
            let loaded = prefetch.finish(|done, total| progress(Progress::Bytes { done, total }));
            log_loaded(&loaded);
            Ok((built.runner, built.facts))
        })?;
        let info = ModelInfo {
            served_model_name: name,
            architecture: spec.architecture.to_owned(),
            num_parameters,
            weight_bytes_per_step,
            vocab_size: spec.vocab_size,
            max_model_len: facts.max_model_len,
            device: facts.device,
            dtype: facts.dtype,
            kv_cache_dtype: device::name(facts.kv.dtype),
            block_size: facts.kv.block_size,
            num_kv_blocks: facts.kv.num_blocks,
            max_num_seqs: facts.max_num_seqs,
            max_num_batched_tokens: facts.max_num_batched_tokens,
            eos_token_ids: defaults.eos.clone(),
            has_chat_template: text.has_chat_template(),
            defaults,
            is_bidirectional: spec.is_bidirectional(),
            embedding: head_spec.embedding,
            scoring: head_spec.scoring,
        };
        // Saving what costs more to bring back than to compute would be a loss.
        let swap = facts.swap.filter(SwapFacts::pays);
        let host_blocks = swap.map_or(0, |swap| swap.host_blocks);
        let options = EngineOptions {
            scheduling: config.scheduling,
            look_ahead,
            lives: config.lives,
            heads,
            host_blocks,
            adapters,
        };
        Self::with_runner(runner, info, text, options)
    }

    /// Starts the engine thread over a runner: the real one, or one that a test brings. `info` must describe it.
    ///
    /// # Errors
    /// An option that is out of range or contradicts another, or when the thread cannot be started.
    pub fn with_runner(
        runner: RunnerThread,
        info: ModelInfo,
        text: Arc<TextModel>,
        options: EngineOptions,
    ) -> Result<Self, LoadError> {
        let EngineOptions { scheduling, look_ahead, lives, heads, host_blocks, adapters } = options;
        scheduling.check(info.max_num_seqs, info.max_num_batched_tokens)?;
        check_whole(&info)?;
        let pool = block_pool(&info, &scheduling, host_blocks);
        let scheduler =
            SchedulerConfig { max_loras: adapters.max_loras(), ..scheduler_config(&info, &scheduling) };
        let stats = Arc::new(SharedStats::new(pool.clone()));
        let queue = Queue::new(scheduling.max_num_queued_reqs, scheduling.max_num_queued_tokens);
        let settings = Settings {
            look_ahead,
            target_itl: scheduling.target_itl,
            max_queue_time: scheduling.max_queue_time,
            slow_reader_timeout: scheduling.slow_reader_timeout,
            kv_cache_events: scheduling.enable_kv_cache_events,
            model_name: info.served_model_name.clone(),
        };
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
                policy: scheduling.policy,
                embedding: info.embedding,
                scoring: info.scoring,
                is_bidirectional: info.is_bidirectional,
                heads: Arc::new(heads),
                forms: Forms::new(text.clone(), info.eos_token_ids.clone()),
                adapters: adapters.clone(),
            },
            info,
            text,
            adapters,
            stats: stats.clone(),
            queue: queue.clone(),
            max_stream_buffer: scheduling.max_stream_buffer,
            next_ticket: AtomicU64::new(0),
            stopped: Stopped::default(),
            alive,
        });
        let parts = Parts { scheduler, pool, runner, commands, stats, queue, lives, settings };
        let thread = spawn(Core::new(parts), shared.clone(), alive_guard)?;
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

/// A prompt that must be computed in one step must fit into one.
fn check_whole(info: &ModelInfo) -> Result<(), LoadError> {
    if !info.is_bidirectional || info.max_model_len <= info.max_num_batched_tokens {
        return Ok(());
    }
    let detail = format!(
        "{} tokens per step are too few: this model reads a prompt in one step, and prompts have up to {}; raise this, or lower \
         --max-model-len",
        info.max_num_batched_tokens, info.max_model_len
    );
    Err(LoadError::Option { option: "--max-num-batched-tokens", detail })
}

/// Runs an engine thread to its end.
fn spawn(
    mut core: Core,
    shared: Arc<Shared>,
    alive_guard: async_channel::Sender<()>,
) -> Result<thread::JoinHandle<()>, LoadError> {
    let body = move || {
        let ended = panic::catch_unwind(AssertUnwindSafe(|| core.run()));
        let reason = ended.unwrap_or_else(|payload| {
            let said = panic_message(payload.as_ref());
            StopReason::Stopped(format!("the engine thread panicked: {said}"))
        });
        tracing::debug!(%reason, "the engine thread ends");
        // Dropping the core waits for the runner, which may take long: by then everybody has been told.
        shared.stopped.end(reason, (alive_guard, core));
    };
    thread::Builder::new().name("tidemill-engine".into()).spawn(body).map_err(|source| LoadError::Option {
        option: "engine thread",
        detail: format!("cannot be started: {source}"),
    })
}

fn block_pool(info: &ModelInfo, scheduling: &SchedulingConfig, host_blocks: usize) -> BlockPool {
    if !scheduling.enable_prefix_caching {
        return BlockPool::new(info.num_kv_blocks, info.block_size);
    }
    let (key, events) = (rand::random(), scheduling.enable_kv_cache_events);
    let cache = CacheConfig { key, events, host_blocks };
    BlockPool::with_cache(info.num_kv_blocks, info.block_size, cache)
}

fn scheduler_config(info: &ModelInfo, scheduling: &SchedulingConfig) -> SchedulerConfig {
    let half = info.max_num_batched_tokens.div_ceil(2);
    let limits = Limits {
        max_num_seqs: info.max_num_seqs,
        max_num_batched_tokens: info.max_num_batched_tokens,
        long_prefill_token_threshold: scheduling.long_prefill_token_threshold.unwrap_or(half),
    };
    SchedulerConfig {
        limits,
        policy: scheduling.policy,
        weights: scheduling.tenant_weights.clone(),
        max_loras: 0,
    }
}

/// The adapters of the configuration, loaded.
fn adapters(config: &EngineConfig, spec: &ModelSpec, name: &str) -> Result<Arc<Adapters>, LoadError> {
    let adapters = match &config.lora {
        None => Adapters::new(LoraConfig::default(), None, name.to_owned()),
        Some(lora) => {
            lora.check()?;
            Adapters::new(lora.clone(), Some(Sites::of(spec)), name.to_owned())
        }
    };
    adapters.load_modules()?;
    Ok(Arc::new(adapters))
}

fn log_loaded(loaded: &Loaded) {
    let hundredths = |value: f64| (value * 100.0).round() / 100.0;
    tracing::info!(
        gigabytes = hundredths(loaded.bytes as f64 / 1e9),
        of_gigabytes = hundredths(loaded.file_bytes as f64 / 1e9),
        seconds = hundredths(loaded.time.as_secs_f64()),
        gigabytes_per_second = hundredths(loaded.rate()),
        "read the weights"
    );
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
