//! Tidemill's server: gRPC, HTTP, command line, demonstration. The binary is a call of [`main`]; tests start servers in their own process.

pub mod args;
pub mod auth;
pub mod client;
mod clock;
pub mod config;
mod convert;
mod demo;
pub mod exit;
mod gateway;
pub mod grpc;
pub mod http;
mod inspect;
pub mod lives;
mod loading;
pub mod logging;
mod run;
mod serve;
mod terminal;
mod tls;

use std::process::ExitCode;

use tokio::runtime::{Builder, Runtime};

use crate::{
    args::ParseError,
    config::{GatewayConfig, Invocation, ServeConfig},
    exit::Failure,
    logging::LogConfig,
    serve::Ports,
};

/// Does what the command line says and returns the exit code.
pub fn main() -> ExitCode {
    let invocation = match args::parse(std::env::args_os()) {
        Ok(cli) => Invocation::from_args(cli),
        // Prints usage to stderr, or help to stdout, and knows which of the two is a failure.
        Err(ParseError::Clap(error)) => error.exit(),
        Err(ParseError::File(failure)) => Err(failure),
    };
    match invocation.and_then(execute) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            terminal::complain(&failure);
            failure.exit.into()
        }
    }
}

fn execute(invocation: Invocation) -> Result<(), Failure> {
    let color = !args::no_color();
    let runtime = runtime().map_err(Failure::runtime)?;
    let result = match invocation {
        Invocation::Demo => {
            LogConfig::quiet().install(color);
            runtime.block_on(demo::demo(color))
        }
        Invocation::Serve(config) => {
            let ServeConfig { engine, grpc, log, otlp, http } = *config;
            log.install(color);
            runtime.block_on(serve::serve(engine, Ports { grpc, http }, otlp))
        }
        Invocation::Gateway(config) => {
            let GatewayConfig { engine, http, log, shutdown_timeout } = *config;
            log.install(color);
            runtime.block_on(gateway::gateway(engine, http, shutdown_timeout))
        }
        Invocation::Run(config) => {
            LogConfig::quiet().install(color);
            runtime.block_on(run::run(*config))
        }
        Invocation::Inspect(config) => inspect::inspect(&config),
    };
    // Text work that nobody waits for any more does not hold the program up.
    runtime.shutdown_background();
    result
}

/// The network needs little: the cores are the engine's.
fn runtime() -> std::io::Result<Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, Into::into);
    Builder::new_multi_thread()
        .worker_threads(cores.clamp(2, 4))
        .thread_name("tidemill-net")
        .enable_all()
        .build()
}
