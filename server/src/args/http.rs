//! Options of the HTTP port and of the gateway.

use std::path::PathBuf;

use clap::{Args, builder::NonEmptyStringValueParser};

use super::{LogArgs, NetworkArgs};
use crate::config::size::ByteSize;

/// The HTTP port.
#[derive(Debug, Args)]
#[command(next_help_heading = "HTTP")]
pub struct HttpArgs {
    /// Port of the HTTP server; 0 takes a free one, which is printed.
    #[arg(long, value_name = "PORT", default_value_t = 8000, env = "TIDEMILL_PORT")]
    pub port: u16,
    /// Largest body of a request: bytes, or with KiB, MiB, GiB, KB, MB, GB.
    #[arg(long, value_name = "SIZE", default_value = "4MiB", env = "TIDEMILL_MAX_BODY_BYTES")]
    pub max_body_bytes: ByteSize,
    /// Origins whose pages may call from a browser, such as <https://chat.example.com>; `*` lets all of them. May be given several times; the variable
    /// takes a comma-separated list. Default: none.
    #[arg(long, value_name = "ORIGIN", env = "TIDEMILL_ALLOWED_ORIGINS", value_delimiter = ',')]
    pub allowed_origins: Vec<String>,
    /// Serve no page at `/`.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          hide_default_value = true, hide_possible_values = true, value_name = "BOOL", action = clap::ArgAction::Set,
          env = "TIDEMILL_DISABLE_LIVE_PAGE")]
    pub disable_live_page: bool,
}

/// Options of `tidemill gateway`.
#[derive(Debug, Args)]
pub struct GatewayArgs {
    /// A TOML file with options, its keys named as the options here.
    #[arg(long, value_name = "FILE", env = "TIDEMILL_CONFIG")]
    pub config: Option<PathBuf>,
    /// Where the engine's gRPC port is: HOST:PORT or http://HOST:PORT; https://HOST:PORT for TLS.
    #[arg(long, value_name = "HOST:PORT", env = "TIDEMILL_ENGINE", value_parser = NonEmptyStringValueParser::new(), help_heading = "Engine")]
    pub engine: String,
    /// The key that the engine wants. Prefer the variable or the file: a command line is visible to other users of the machine.
    #[arg(
        long,
        value_name = "KEY",
        env = "TIDEMILL_ENGINE_API_KEY",
        hide_env_values = true,
        help_heading = "Engine"
    )]
    pub engine_api_key: Option<String>,
    /// Authority of the engine's certificate, PEM. Default: those that the system trusts.
    #[arg(long, value_name = "FILE", env = "TIDEMILL_ENGINE_TLS_CA", help_heading = "Engine")]
    pub engine_tls_ca: Option<PathBuf>,
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
