//! What the program was asked to do, checked: the rest of it trusts these structs.

pub mod file;
mod http;
mod inspect;
mod lora;
mod run;
mod serve;
pub mod size;

pub use http::{EngineAddress, GatewayConfig, HttpConfig};
pub use inspect::InspectConfig;
pub use run::{PromptSource, RunConfig};
pub use serve::{GrpcConfig, ServeConfig, TlsConfig};

use tidemill_engine::{ComputeDtype, DType, EngineConfig, Quantization};

use crate::{
    args::{Cli, Command, DtypeArg, KvDtypeArg, ModelArgs, QuantizationArg, user_cache},
    exit::Failure,
};

/// One thing to do.
#[derive(Debug)]
pub enum Invocation {
    /// The demonstration.
    Demo,
    /// The server.
    Serve(Box<ServeConfig>),
    /// The HTTP front of an engine elsewhere.
    Gateway(Box<GatewayConfig>),
    /// One prompt.
    Run(Box<RunConfig>),
    /// What a model folder holds.
    Inspect(Box<InspectConfig>),
}

impl Invocation {
    /// Checks arguments.
    ///
    /// # Errors
    /// What is wrong and what to do, as wrong usage.
    pub fn from_args(cli: Cli) -> Result<Self, Failure> {
        Ok(match cli.command {
            None => Self::Demo,
            Some(Command::Serve(args)) => Self::Serve(Box::new(ServeConfig::from_args(*args)?)),
            Some(Command::Gateway(args)) => Self::Gateway(Box::new(GatewayConfig::from_args(*args)?)),
            Some(Command::Run(args)) => Self::Run(Box::new(RunConfig::from_args(*args)?)),
            Some(Command::Inspect(args)) => Self::Inspect(Box::new(InspectConfig::from_args(*args))),
        })
    }
}

/// The engine's configuration as far as the model's options determine it.
fn engine_config(args: ModelArgs) -> Result<EngineConfig, Failure> {
    let mut config = EngineConfig::new(args.model);
    config.chat_template = args.chat_template;
    config.classifier_from_token = args.classifier_from_token;
    config.dtype = match args.dtype {
        DtypeArg::Auto => ComputeDtype::Auto,
        DtypeArg::Bfloat16 => ComputeDtype::Bf16,
        DtypeArg::Float32 => ComputeDtype::F32,
    };
    config.kv_cache_dtype = match args.kv_cache_dtype {
        KvDtypeArg::Auto => None,
        KvDtypeArg::Bfloat16 => Some(DType::Bf16),
        KvDtypeArg::Float32 => Some(DType::F32),
        KvDtypeArg::Fp8 => Some(DType::F8E4M3),
    };
    config.quantization = args.quantization.map(|to| match to {
        QuantizationArg::Fp8 => Quantization::Fp8,
        QuantizationArg::Int8 => Quantization::Int8,
    });
    config.threads = args.threads.map(Into::into);
    config.max_model_len = args.max_model_len.map(Into::into);
    config.max_num_batched_tokens = args.max_num_batched_tokens.map(Into::into);
    config.block_size = args.block_size.into();
    config.device = args.device;
    config.gpu_memory_utilization = args.gpu_memory_utilization;
    config.enforce_eager = args.enforce_eager;
    config.kernel_cache = args.kernel_cache.or_else(user_cache);
    config.kv_cache_memory = args.kv_cache_memory.map(|size| size.0);
    Ok(config)
}
