//! From options to a runner on a device: which device, what precision, how much memory.

use tidemill_kernels::{
    DType, Ops,
    cpu::{Compute, CpuConfig, CpuOps},
    ops::KvShape,
};

use crate::{
    config::{ComputeDtype, EngineConfig},
    error::LoadError,
    model::{
        checkpoint::Checkpoint,
        decoder::{Decoder, DecoderLimits},
        spec::ModelSpec,
    },
    runner::{DecoderRunner, Runner},
    sizes::{Asked, Defaults},
};

/// Default bound of the CPU's KV cache in bytes.
const CPU_KV_BYTES: usize = 2 << 30;
const CPU_DEFAULTS: Defaults = Defaults { max_num_seqs: 64, max_num_batched_tokens: 512 };

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
        let (kv, max_model_len) = asked.kv(self.spec, self.config.kv_cache_dtype.unwrap_or(dtype), budget)?;
        let ops = CpuOps::new(CpuConfig { compute, isa: None, threads: self.config.threads })?;
        let device = format!("cpu ({}, {} threads)", ops.isa(), ops.threads());
        let mut decoder = self.decoder(ops, asked.max_num_batched_tokens, max_model_len, progress)?;
        decoder.allocate_kv(kv)?;
        decoder.warm_up()?;
        let facts = Facts {
            device,
            dtype: name(dtype),
            kv,
            max_model_len,
            max_num_seqs: asked.max_num_seqs,
            max_num_batched_tokens: asked.max_num_batched_tokens,
        };
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
        Decoder::load(ops, self.spec, self.checkpoint, limits, progress)
    }

    /// The element type of the checkpoint's embedding, and so of all its matrices.
    fn stored_dtype(&self) -> Result<DType, LoadError> {
        let shape = [self.spec.vocab_size, self.spec.hidden_size];
        Ok(self.checkpoint.tensor("model.embed_tokens.weight", &shape)?.dtype)
    }
}

/// The name of an arithmetic, as in options.
pub(crate) fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        DType::F32 => "float32",
    }
}
