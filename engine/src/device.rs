//! From options to a runner on a device: which device, what precision, how much memory.

use std::sync::Arc;

use tidemill_kernels::{
    DType, Ops,
    cpu::{Compute, CpuConfig, CpuOps},
    cuda::{
        CudaConfig, CudaOps, Device,
        driver::Driver,
        gpu::{self, GpuDriver, GpuError, GpuOptions},
    },
    ops::KvShape,
};

use crate::{
    config::{ComputeDtype, DeviceChoice, EngineConfig},
    error::LoadError,
    model::{
        checkpoint::Checkpoint,
        decoder::{Decoder, DecoderLimits},
        formats::Quantized,
        spec::ModelSpec,
    },
    runner::{DecoderRunner, Runner},
    sizes::{Asked, Defaults},
    swap::SwapFacts,
};

/// Default bound of the CPU's KV cache in bytes.
pub(crate) const CPU_KV_BYTES: usize = 2 << 30;
pub(crate) const CPU_DEFAULTS: Defaults = Defaults { max_num_seqs: 64, max_num_batched_tokens: 512 };
const CUDA_DEFAULTS: Defaults = Defaults { max_num_seqs: 256, max_num_batched_tokens: 2048 };

/// The GPU to use; `None` is the CPU.
///
/// # Errors
/// When a GPU was asked for and cannot be used.
pub(crate) fn choose(config: &EngineConfig) -> Result<Option<Arc<dyn Driver>>, LoadError> {
    let open = |ordinal| -> Result<Arc<dyn Driver>, GpuError> {
        let driver = gpu::open(ordinal, &GpuOptions { cache_dir: config.kernel_cache.clone() })?;
        log_kernels(&driver);
        Ok(Arc::new(driver))
    };
    match config.device {
        DeviceChoice::Cpu => Ok(None),
        DeviceChoice::Cuda(ordinal) => match open(ordinal) {
            Ok(driver) => Ok(Some(driver)),
            Err(error) => Err(LoadError::Option { option: "--device", detail: error.to_string() }),
        },
        // What only the CPU computes is no reason to refuse.
        DeviceChoice::Auto if refuse_what_cuda_lacks(config).is_err() => Ok(None),
        DeviceChoice::Auto => match open(0) {
            Ok(driver) => Ok(Some(driver)),
            Err(error @ (GpuError::NoDriver | GpuError::NoDevice)) => {
                tracing::debug!(%error, "computing on the CPU");
                Ok(None)
            }
            Err(error) => {
                tracing::warn!(%error, "there is a GPU, but it cannot be used; computing on the CPU");
                Ok(None)
            }
        },
    }
}

fn log_kernels(driver: &GpuDriver) {
    tracing::info!(device = driver.info().name, kernels = %driver.kernel_origin(), "opened a GPU");
}

/// A model that is loaded, warm and ready to run, and what it came to.
pub(crate) struct Built {
    pub runner: Box<dyn Runner>,
    pub facts: Facts,
}

/// What the device and its memory decided.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// In words.
    pub device: String,
    /// `bfloat16` or `float32`.
    pub dtype: &'static str,
    pub kv: KvShape,
    pub max_model_len: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    /// Host blocks and what they cost; absent when there are none.
    pub swap: Option<SwapFacts>,
}

impl Facts {
    fn log_swap(&self) {
        if let Some(swap) = &self.swap {
            let micros = |seconds: f64| seconds * 1e6;
            tracing::info!(
                host_blocks = swap.host_blocks,
                save_us = micros(swap.save_seconds_per_block),
                load_us = micros(swap.load_seconds_per_block),
                recompute_us = micros(swap.recompute_seconds_per_block),
                pays = swap.pays(),
                "measured what a block costs to save, to load and to compute anew"
            );
        }
    }
}

/// What is to be loaded.
pub(crate) struct Model<'a> {
    pub config: &'a EngineConfig,
    pub spec: &'a ModelSpec,
    pub checkpoint: &'a Checkpoint,
}

impl Model<'_> {
    /// Loads onto the CPU. `progress` gets the number of layers done.
    pub fn on_cpu(&self, progress: impl FnMut(usize)) -> Result<Built, LoadError> {
        let compute = match (self.config.dtype, self.stored_dtype()?) {
            (ComputeDtype::Bf16, _) | (ComputeDtype::Auto, DType::Bf16) => Compute::Bf16,
            (ComputeDtype::F32, _) | (ComputeDtype::Auto, _) => Compute::F32,
        };
        let dtype = if compute == Compute::Bf16 { DType::Bf16 } else { DType::F32 };
        let asked = Asked::check(self.config, self.spec, CPU_DEFAULTS)?;
        let budget = self.config.kv_cache_memory.unwrap_or(CPU_KV_BYTES);
        let (kv, max_model_len) =
            asked.kv(self.spec, self.config.kv_cache_dtype.unwrap_or(dtype), budget, "--kv-cache-memory")?;
        let ops = CpuOps::new(CpuConfig { compute, isa: None, threads: self.config.threads })?;
        let device = format!("cpu ({}, {} threads)", ops.isa(), ops.threads());
        let mut decoder = self.decoder(ops, asked.max_num_batched_tokens, max_model_len, progress)?;
        decoder.allocate_kv(kv)?;
        let swap = SwapFacts::allocate(&mut decoder, kv, self.config.swap_space, asked.max_num_seqs)?;
        decoder.warm_up()?;
        let facts = Facts {
            device,
            dtype: name(dtype),
            kv,
            max_model_len,
            max_num_seqs: asked.max_num_seqs,
            max_num_batched_tokens: asked.max_num_batched_tokens,
            swap,
        };
        facts.log_swap();
        Ok(Built { runner: Box::new(DecoderRunner::new(decoder, kv.block_size)), facts })
    }

    /// Loads onto a GPU. `progress` gets the number of layers done.
    pub fn on_cuda(&self, driver: Arc<dyn Driver>, progress: impl FnMut(usize)) -> Result<Built, LoadError> {
        let Self { config, spec, .. } = *self;
        let asked = Asked::check(config, spec, CUDA_DEFAULTS)?;
        refuse_what_cuda_lacks(config)?;
        if self.stored_dtype()? != DType::Bf16 {
            tracing::info!("the weights are rounded to bfloat16 on their way to the GPU");
        }
        let device = format!("cuda ({})", driver.info().name);
        let ops = CudaOps::new(
            Device::new(driver),
            CudaConfig {
                max_tokens: asked.max_num_batched_tokens,
                max_rows: asked.max_num_seqs,
                max_model_len: asked.max_model_len,
                block_size: asked.block_size,
                attention: spec.cuda_attention(),
                vocab: spec.vocab_size,
                graphs: !config.enforce_eager,
            },
        )?;
        let mut decoder = self.decoder(ops, asked.max_num_batched_tokens, asked.max_model_len, progress)?;
        let (budget, option) = match config.kv_cache_memory {
            Some(bytes) => (bytes, "--kv-cache-memory"),
            None => {
                // Whatever the largest step still needs is allocated by it.
                decoder.allocate_kv(asked.kv_shape(spec, DType::Bf16, 1))?;
                decoder.profile(asked.max_num_seqs)?;
                (decoder.ops().memory_left(config.gpu_memory_utilization)?, "--gpu-memory-utilization")
            }
        };
        let (kv, max_model_len) = asked.kv(spec, DType::Bf16, budget, option)?;
        decoder.allocate_kv(kv)?;
        let swap = SwapFacts::allocate(&mut decoder, kv, self.config.swap_space, asked.max_num_seqs)?;
        decoder.warm_up()?;
        let facts = Facts {
            device,
            dtype: name(DType::Bf16),
            kv,
            max_model_len,
            max_num_seqs: asked.max_num_seqs,
            max_num_batched_tokens: asked.max_num_batched_tokens,
            swap,
        };
        facts.log_swap();
        Ok(Built { runner: Box::new(DecoderRunner::new(decoder, kv.block_size)), facts })
    }

    fn decoder<O: Ops>(
        &self,
        ops: O,
        max_num_batched_tokens: usize,
        max_model_len: usize,
        progress: impl FnMut(usize),
    ) -> Result<Decoder<O>, LoadError> {
        let limits = DecoderLimits { max_num_batched_tokens, max_model_len };
        let mut decoder = match self.config.quantization {
            None => Decoder::load(ops, self.spec, self.checkpoint, limits, progress)?,
            Some(_) if self.checkpoint.is_quantized() => {
                return Err(LoadError::Option {
                    option: "--quantization",
                    detail: "the checkpoint is quantised already; leave the option out".to_owned(),
                });
            }
            Some(to) => {
                let tensors = Quantized { tensors: self.checkpoint, to };
                Decoder::load(ops, self.spec, &tensors, limits, progress)?
            }
        };
        if let Some(lora) = &self.config.lora {
            decoder.allocate_lora(lora.max_loras, lora.max_lora_rank)?;
        }
        Ok(decoder)
    }

    fn stored_dtype(&self) -> Result<DType, LoadError> {
        stored_dtype(self.spec, self.checkpoint)
    }
}

/// The element type of the checkpoint's embedding, and so of all its matrices; of quantised ones bf16, which is what they are decoded to.
pub(crate) fn stored_dtype(spec: &ModelSpec, checkpoint: &Checkpoint) -> Result<DType, LoadError> {
    let name = spec.embedding_name();
    match checkpoint.stored(&name) {
        _ if checkpoint.is_quantized() => Ok(DType::Bf16),
        Some((_, Some(dtype))) => Ok(dtype),
        _ => checkpoint.tensor(&name, &[spec.vocab_size, spec.hidden_size]).map(|tensor| tensor.dtype),
    }
}

fn refuse_what_cuda_lacks(config: &EngineConfig) -> Result<(), LoadError> {
    let option = |option, detail: &str| Err(LoadError::Option { option, detail: detail.into() });
    if config.dtype == ComputeDtype::F32 {
        return option("--dtype", "float32 is computed on the CPU alone; take bfloat16, or --device cpu");
    }
    if config.kv_cache_dtype.is_some_and(|dtype| !matches!(dtype, DType::Bf16 | DType::F8E4M3)) {
        return option(
            "--kv-cache-dtype",
            "a GPU keeps keys and values in bfloat16 or fp8; take one of them, or --device cpu",
        );
    }
    if !config.block_size.is_power_of_two() || !(16..=256).contains(&config.block_size) {
        return option("--block-size", "on a GPU a block holds 16, 32, 64, 128 or 256 tokens");
    }
    Ok(())
}

/// The name of an arithmetic, as in options.
pub(crate) fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        DType::F32 => "float32",
        DType::F8E4M3 => "fp8",
    }
}
