//! The command line as typed. The only place that reads environment variables.
//!
//! Every option of `serve` can also stand in a TOML file ([`crate::config::file`]) and in the environment. The command line wins
//! over the environment, the environment over the file, the file over the default. What is read here is checked once, in
//! [`crate::config`], and nothing else of the program sees it.

mod http;
mod lora;
mod scheduling;

use std::{ffi::OsString, num::NonZeroUsize, path::PathBuf, time::Duration};

use clap::{
    Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, builder::NonEmptyStringValueParser,
};
use tidemill_engine::{DeviceChoice, EngineConfig, model::files::ModelSource};

use crate::{
    config::file,
    config::size::ByteSize,
    exit::{EXIT_CODES, Failure},
    http::answer::parsers::{ParserChoice, ReasoningFormat, ToolFormat},
    lives::OtlpEndpoint,
};

pub use http::{GatewayArgs, HttpArgs};
pub use lora::{LoraArgs, LoraModule};
pub use scheduling::{PolicyArg, SchedulingArgs, TenantWeight};

/// An LLM inference engine: continuous batching, streaming over gRPC and HTTP, immediate aborts.
///
/// Without a command it gives a demonstration: it starts the server with the built-in model, streams several prompts at once over
/// gRPC, aborts one of them, and reports latencies and throughput.
#[derive(Debug, Parser)]
#[command(name = "tidemill", version, after_help = EXIT_CODES, after_long_help = examples(MAIN_EXAMPLES), max_term_width = 110)]
pub struct Cli {
    /// What to do; none gives the demonstration.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over gRPC and HTTP until SIGTERM or SIGINT.
    #[command(after_help = EXIT_CODES, after_long_help = examples(SERVE_EXAMPLES))]
    Serve(Box<ServeArgs>),
    /// Serve HTTP in front of an engine that runs elsewhere: a `tidemill serve`, reached over gRPC.
    #[command(after_help = EXIT_CODES, after_long_help = examples(GATEWAY_EXAMPLES))]
    Gateway(Box<GatewayArgs>),
    /// Complete one prompt and stream the answer to stdout.
    #[command(after_help = EXIT_CODES, after_long_help = examples(RUN_EXAMPLES))]
    Run(Box<RunArgs>),
    /// Say what a model folder holds, what it needs and what would fail; no weight is read.
    #[command(after_help = EXIT_CODES, after_long_help = examples(INSPECT_EXAMPLES))]
    Inspect(Box<InspectArgs>),
}

const MAIN_EXAMPLES: &str = "
  tidemill                                   the demonstration
  tidemill run \"Tell me a short story.\"      one prompt, streamed to stdout
  tidemill serve --model ./Llama-3.2-1B      gRPC on 127.0.0.1:50051, HTTP on 127.0.0.1:8000";

const SERVE_EXAMPLES: &str = "
  tidemill serve                                       the built-in model on 127.0.0.1:50051
  tidemill serve --model ./Llama-3.2-1B --grpc-port 0  a model folder, on a free port (printed)
  tidemill serve --config tidemill.toml                options from a file, e.g.
                                                           model = \"./Llama-3.2-1B\"
                                                           max-num-seqs = 32
                                                           kv-cache-memory = \"4GiB\"
  TIDEMILL_API_KEY=secret tidemill serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{\"messages\": [{\"role\": \"user\", \"content\": \"What is a KV cache?\"}]}'
  grpcurl -plaintext -d '{\"text\": \"Once\"}' 127.0.0.1:50051 tidemill.v1.Inference/Generate

Every option can be given on the command line, as an environment variable (shown
beside it) or in the TOML file, where its key is the option's name without dashes
in front. The command line wins over the environment, the environment over the file.";

const GATEWAY_EXAMPLES: &str = "
  tidemill gateway --engine 127.0.0.1:50051                   HTTP on 127.0.0.1:8000 in front of a server on this machine
  TIDEMILL_ENGINE_API_KEY=secret TIDEMILL_API_KEY=mine \\
      tidemill gateway --engine https://gpu1:50051 --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem";

const INSPECT_EXAMPLES: &str = "
  tidemill inspect ./Llama-3.2-1B          what is in the folder, what fits on this machine
  tidemill inspect ./Llama-3.2-1B --json   the same for programs
  tidemill inspect model.safetensors       the tensors of one file

The exit code is 0 for a model that can be served, and 3 for one that cannot: the errors are
those with which `serve` would end.";

const RUN_EXAMPLES: &str = "
  tidemill run \"What is a KV cache?\"
  tidemill run --model ./Llama-3.2-1B --temperature 0 --max-tokens 64 \"The capital of France is\" --raw
  cat question.txt | tidemill run - --verbose";

fn examples(examples: &str) -> String {
    format!("Examples:{examples}\n\n{EXIT_CODES}")
}

/// Arithmetic types that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// As the model is stored: bfloat16, or else float32; on a GPU always bfloat16.
    Auto,
    /// Half the memory, 8 bits of precision.
    Bfloat16,
    /// Full precision.
    Float32,
}

/// Storage of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvDtypeArg {
    /// As --dtype.
    Auto,
    /// Half the memory, 8 bits of precision.
    Bfloat16,
    /// Full precision.
    Float32,
    /// A quarter of the memory, 4 bits of precision (F8E4M3): more contexts fit, and answers change.
    Fp8,
}

/// What matrices become as they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantizationArg {
    /// 8-bit floating point (F8E4M3) with a scale for each row.
    Fp8,
    /// Signed bytes with a scale for each 128 columns of a row.
    Int8,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Options of the model and how it is computed.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// A model folder as it comes from the hub (config.json, tokenizer.json, *.safetensors), a GGUF file, or `builtin`.
    #[arg(long, value_name = "DIR|builtin", default_value = "builtin", env = "TIDEMILL_MODEL", value_parser = model_source)]
    pub model: ModelSource,
    /// A Jinja file that replaces the model's own chat template.
    #[arg(long, value_name = "FILE", env = "TIDEMILL_CHAT_TEMPLATE")]
    pub chat_template: Option<PathBuf>,
    /// For rerankers that answer with yes or no (Qwen3-Reranker): the two tokens whose logits make a score, the negative one first. Default:
    /// what the model folder says.
    #[arg(long, value_name = "NO,YES", env = "TIDEMILL_CLASSIFIER_FROM_TOKEN", value_parser = two_tokens)]
    pub classifier_from_token: Option<[String; 2]>,
    /// Arithmetic of the matrix products.
    #[arg(long, value_enum, default_value = "auto", env = "TIDEMILL_DTYPE")]
    pub dtype: DtypeArg,
    /// Where to compute: the CPU, an NVIDIA GPU (`cuda` is `cuda:0`), or the first GPU if there is one that can be used.
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto", env = "TIDEMILL_DEVICE", value_parser = device)]
    pub device: DeviceChoice,
    /// Share of the GPU's memory to take for weights, activations and KV cache.
    #[arg(long, value_name = "SHARE", default_value_t = engine_defaults().gpu_memory_utilization, env = "TIDEMILL_GPU_MEMORY_UTILIZATION", value_parser = share)]
    pub gpu_memory_utilization: f64,
    /// Launch every kernel by itself on a GPU, without CUDA graphs: slower, easier to debug.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          hide_default_value = true, hide_possible_values = true, value_name = "BOOL", action = clap::ArgAction::Set,
          env = "TIDEMILL_ENFORCE_EAGER")]
    pub enforce_eager: bool,
    /// Folder for kernels compiled on this machine, by builds that carry no precompiled ones. Default: tidemill/kernels in the
    /// user's cache folder.
    #[arg(long, value_name = "DIR", env = "TIDEMILL_KERNEL_CACHE")]
    pub kernel_cache: Option<PathBuf>,
    /// Threads of the CPU backend. Default: one per core.
    #[arg(long, value_name = "N", env = "TIDEMILL_THREADS")]
    pub threads: Option<NonZeroUsize>,
    /// Tokens of prompt and completion together. Default: what the model was made for, or what the KV cache holds.
    #[arg(long, value_name = "N", env = "TIDEMILL_MAX_MODEL_LEN")]
    pub max_model_len: Option<NonZeroUsize>,
    /// Tokens that a step of the engine computes at most; long prompts are read in chunks of this. Default: 512, on a GPU 2048.
    #[arg(long, value_name = "N", env = "TIDEMILL_MAX_NUM_BATCHED_TOKENS")]
    pub max_num_batched_tokens: Option<NonZeroUsize>,
    /// Tokens per block of the KV cache.
    #[arg(long, value_name = "N", default_value_t = size(engine_defaults().block_size), env = "TIDEMILL_BLOCK_SIZE")]
    pub block_size: NonZeroUsize,
    /// Quantise the matrices of linear layers as they are loaded: half the memory of bfloat16 and less to read for each token. Not for checkpoints
    /// that are quantised already; on the CPU.
    #[arg(long, value_enum, env = "TIDEMILL_QUANTIZATION")]
    pub quantization: Option<QuantizationArg>,
    /// Storage of keys and values; `auto` follows --dtype.
    #[arg(long, value_enum, default_value = "auto", env = "TIDEMILL_KV_CACHE_DTYPE")]
    pub kv_cache_dtype: KvDtypeArg,
    /// Memory for keys and values: bytes, or with KiB, MiB, GiB, KB, MB, GB. Default: what a full batch needs, at most 2GiB; on a
    /// GPU at most what --gpu-memory-utilization leaves.
    #[arg(long, value_name = "SIZE", env = "TIDEMILL_KV_CACHE_MEMORY")]
    pub kv_cache_memory: Option<ByteSize>,
}

/// Options of `tidemill serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A TOML file with options, its keys named as the options here.
    #[arg(long, value_name = "FILE", env = "TIDEMILL_CONFIG")]
    pub config: Option<PathBuf>,
    /// The model and how it is computed.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Requests and limits.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Whose turn it is, what is refused.
    #[command(flatten)]
    pub scheduling: SchedulingArgs,
    /// Adapters.
    #[command(flatten)]
    pub lora: LoraArgs,
    /// Port of the gRPC server; 0 takes a free one, which is printed.
    #[arg(
        long,
        value_name = "PORT",
        default_value_t = 50051,
        env = "TIDEMILL_GRPC_PORT",
        help_heading = "Network"
    )]
    pub grpc_port: u16,
    /// Serve gRPC alone.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          hide_default_value = true, hide_possible_values = true, value_name = "BOOL", action = clap::ArgAction::Set,
          env = "TIDEMILL_NO_HTTP", help_heading = "HTTP")]
    pub no_http: bool,
    /// How the model writes tool calls: auto (as its chat template looks), none, or a format by name. A wrong name is answered with the list.
    #[arg(
        long,
        value_name = "auto|none|FORMAT",
        default_value = "auto",
        env = "TIDEMILL_TOOL_CALL_PARSER",
        help_heading = "HTTP"
    )]
    pub tool_call_parser: ParserChoice<ToolFormat>,
    /// How the model marks its thoughts: auto (as its chat template looks), none, or a style by name. A wrong name is answered with the list.
    #[arg(
        long,
        value_name = "auto|none|STYLE",
        default_value = "auto",
        env = "TIDEMILL_REASONING_PARSER",
        help_heading = "HTTP"
    )]
    pub reasoning_parser: ParserChoice<ReasoningFormat>,
    /// The HTTP port.
    #[command(flatten)]
    pub http: HttpArgs,
    /// Address, credentials.
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Log lines, traces.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Who is served, and how much at once.
#[derive(Debug, Args)]
#[command(next_help_heading = "Serving")]
pub struct LimitArgs {
    /// The name clients use for the model. Default: the folder's name.
    #[arg(long, value_name = "NAME", env = "TIDEMILL_SERVED_MODEL_NAME", value_parser = NonEmptyStringValueParser::new())]
    pub served_model_name: Option<String>,
    /// Load no tokenizer: prompts are token ids, answers are token ids, and whatever needs text (conversations, stop strings, forms of answers) is
    /// refused.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          hide_default_value = true, hide_possible_values = true, value_name = "BOOL", action = clap::ArgAction::Set,
          env = "TIDEMILL_SKIP_TOKENIZER_INIT")]
    pub skip_tokenizer_init: bool,
    /// Sequences in the batch at once. Default: 64, on a GPU 256.
    #[arg(long, value_name = "N", env = "TIDEMILL_MAX_NUM_SEQS")]
    pub max_num_seqs: Option<NonZeroUsize>,
}

/// Address and credentials.
#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
pub struct NetworkArgs {
    /// Name or address to listen on. Others than loopback need --api-key, --tls-client-ca or --insecure-bind.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", env = "TIDEMILL_HOST", value_parser = NonEmptyStringValueParser::new())]
    pub host: String,
    /// A key that clients must present (`authorization: Bearer KEY`, or `x-api-key: KEY`). May be given several times; the variable takes a
    /// comma-separated list. Prefer the variable or the file: a command line is visible to other users of the machine.
    #[arg(long, value_name = "KEY", env = "TIDEMILL_API_KEY", value_delimiter = ',', hide_env_values = true)]
    pub api_key: Vec<String>,
    /// Listen on a non-loopback address without any credentials.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          hide_default_value = true, hide_possible_values = true, value_name = "BOOL", action = clap::ArgAction::Set,
          env = "TIDEMILL_INSECURE_BIND")]
    pub insecure_bind: bool,
    /// Seconds without a sign of life from a connection before it is asked for one (an HTTP/2 PING).
    #[arg(long, value_name = "SECONDS", default_value = "20", env = "TIDEMILL_KEEPALIVE_INTERVAL", value_parser = some_seconds, allow_negative_numbers = true)]
    pub keepalive_interval: Duration,
    /// Seconds to wait for that sign. Without it the connection is closed and its requests are aborted: both times together are
    /// how long the work of a client goes on that vanished without a word.
    #[arg(long, value_name = "SECONDS", default_value = "10", env = "TIDEMILL_KEEPALIVE_TIMEOUT", value_parser = some_seconds, allow_negative_numbers = true)]
    pub keepalive_timeout: Duration,
    /// Seconds that running requests get to finish after SIGTERM or SIGINT.
    #[arg(long, value_name = "SECONDS", default_value = "30", env = "TIDEMILL_SHUTDOWN_TIMEOUT", value_parser = seconds, allow_negative_numbers = true)]
    pub shutdown_timeout: Duration,
    /// Certificate chain of the server, PEM; turns TLS on.
    #[arg(long, value_name = "FILE", env = "TIDEMILL_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate, PEM.
    #[arg(long, value_name = "FILE", env = "TIDEMILL_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// Authority whose certificates clients must present, PEM; turns mutual TLS on.
    #[arg(long, value_name = "FILE", env = "TIDEMILL_TLS_CLIENT_CA")]
    pub tls_client_ca: Option<PathBuf>,
}

/// Log lines, on stderr, and traces.
#[derive(Debug, Args)]
#[command(next_help_heading = "Logging and traces")]
pub struct LogArgs {
    /// How log lines look.
    #[arg(long, value_enum, default_value = "text", env = "TIDEMILL_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// error, warn, info, debug, trace, or directives such as `info,h2=debug`.
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "TIDEMILL_LOG_LEVEL")]
    pub log_level: String,
    /// Where an OpenTelemetry collector takes traces over gRPC, such as http://localhost:4317: one trace per request, under the span that its
    /// `traceparent` header names. A collector that is slow or away loses traces and harms nothing else. Default: none are sent.
    #[arg(long, value_name = "URL", env = "TIDEMILL_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<OtlpEndpoint>,
}

/// Options of `tidemill run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The prompt; `-` reads it from stdin.
    #[arg(value_name = "PROMPT")]
    pub prompt: String,
    /// Complete the prompt as it is, without the chat template.
    #[arg(long)]
    pub raw: bool,
    /// Report tokens and times on stderr.
    #[arg(long, short)]
    pub verbose: bool,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// The model and how it is computed.
    #[command(flatten)]
    pub model: ModelArgs,
}

/// Options of `tidemill inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A model folder, one weight file, or `builtin`.
    #[arg(value_name = "DIR|FILE|builtin", value_parser = model_source)]
    pub model: ModelSource,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
    /// As in `serve`: a Jinja file that replaces the model's own chat template.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// As in `serve`: do without a tokenizer.
    #[arg(long)]
    pub skip_tokenizer_init: bool,
    /// As in `serve`: tokens of prompt and completion together.
    #[arg(long, value_name = "N")]
    pub max_model_len: Option<NonZeroUsize>,
    /// As in `serve`: share of a GPU's memory.
    #[arg(long, value_name = "SHARE", default_value_t = engine_defaults().gpu_memory_utilization, value_parser = share)]
    pub gpu_memory_utilization: f64,
}

/// How tokens are chosen. What is absent comes from the model's generation_config.json.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// 0 is greedy.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Keep the most likely tokens with this probability together.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Keep so many of the most likely tokens; 0 keeps all.
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Tokens to generate at most.
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// Same seed, same answer.
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    /// A string that ends the answer; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

/// Reads the command line, the environment and, for `serve`, the configuration file.
///
/// # Errors
/// [`ParseError::Clap`] for what clap reports (help and version among them); [`ParseError::File`] for the file.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, ParseError> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let mut command = Cli::command();
    let matches = command.try_get_matches_from_mut(&arguments)?;
    let cli = Cli::from_arg_matches(&matches)?;
    let file = match &cli.command {
        Some(Command::Serve(args)) => args.config.as_deref().map(|path| ("serve", path)),
        Some(Command::Gateway(args)) => args.config.as_deref().map(|path| ("gateway", path)),
        _ => None,
    };
    let Some((name, path)) = file else { return Ok(cli) };
    let command = file::with_defaults(Cli::command(), name, path).map_err(ParseError::File)?;
    let matches = command.try_get_matches_from(&arguments)?;
    Ok(Cli::from_arg_matches(&matches)?)
}

/// Why the arguments were not accepted.
#[derive(Debug)]
pub enum ParseError {
    /// In clap's words.
    Clap(clap::Error),
    /// The configuration file.
    File(Failure),
}

impl From<clap::Error> for ParseError {
    fn from(error: clap::Error) -> Self {
        Self::Clap(error)
    }
}

/// Whether people asked for no colours; see <https://no-color.org>.
pub fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

fn model_source(value: &str) -> Result<ModelSource, String> {
    match value {
        "" => Err("name a model folder, or `builtin`".into()),
        "builtin" => Ok(ModelSource::Builtin),
        dir => Ok(ModelSource::Dir(dir.into())),
    }
}

/// The user's cache folder for compiled kernels, by the XDG base directory specification.
pub fn user_cache() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("tidemill").join("kernels"))
}

fn device(value: &str) -> Result<DeviceChoice, String> {
    match value {
        "auto" => Ok(DeviceChoice::Auto),
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" => Ok(DeviceChoice::Cuda(0)),
        _ => {
            let ordinal = value.strip_prefix("cuda:").and_then(|n| n.parse().ok());
            ordinal.map(DeviceChoice::Cuda).ok_or_else(|| "write auto, cpu, cuda or cuda:N".into())
        }
    }
}

fn share(value: &str) -> Result<f64, String> {
    let share = value.parse().ok().filter(|&share: &f64| share > 0.0 && share <= 1.0);
    share.ok_or_else(|| "a share is above 0 and at most 1".into())
}

fn seconds(value: &str) -> Result<Duration, String> {
    let seconds: f64 = value.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn some_seconds(value: &str) -> Result<Duration, String> {
    // The transport's clock ticks in milliseconds, and it adds to the present without a check.
    let accepted = Duration::from_millis(1)..=Duration::from_secs(86_400);
    let seconds = seconds(value)?;
    accepted.contains(&seconds).then_some(seconds).ok_or_else(|| "use 0.001 to 86400".into())
}

fn two_tokens(text: &str) -> Result<[String; 2], String> {
    match text.split_once(',') {
        Some((no, yes)) if !no.is_empty() && !yes.is_empty() => Ok([no.to_owned(), yes.to_owned()]),
        _ => Err("must be two tokens with a comma between, the negative one first, such as no,yes".into()),
    }
}

fn engine_defaults() -> EngineConfig {
    EngineConfig::new(ModelSource::Builtin)
}

fn size(value: usize) -> NonZeroUsize {
    NonZeroUsize::new(value).unwrap_or(NonZeroUsize::MIN)
}
