//! Structured log lines on stderr. What clients sent is logged in Rust's debug form, so that it cannot forge lines.

use std::io::{self, IsTerminal};

use tracing_subscriber::{EnvFilter, fmt};

use crate::{args::LogFormat, exit::Failure};

/// How to log.
#[derive(Debug)]
pub struct LogConfig {
    format: LogFormat,
    filter: EnvFilter,
}

impl LogConfig {
    /// Lines of this form from this level on.
    ///
    /// # Errors
    /// When the level is none.
    pub fn new(format: LogFormat, level: &str) -> Result<Self, Failure> {
        let wrong = |error| {
            Failure::usage(format_args!(
                "--log-level {level:?}: {error}; use error, warn, info, debug, trace, or directives such as info,h2=debug"
            ))
        };
        Ok(Self { format, filter: EnvFilter::builder().parse(level).map_err(wrong)? })
    }

    /// Warnings as text: for commands whose output is something else.
    pub fn quiet() -> Self {
        Self { format: LogFormat::Text, filter: EnvFilter::new("warn") }
    }

    /// Starts logging, panics included. Later calls change nothing.
    pub fn install(self, color: bool) {
        // A line that cannot be written is lost. To say so on stderr, as is the default, would panic: stderr is what is gone.
        let builder = fmt().with_env_filter(self.filter).with_writer(io::stderr).log_internal_errors(false);
        let ansi = color && io::stderr().is_terminal();
        let installed = match self.format {
            LogFormat::Text => builder.with_ansi(ansi).try_init(),
            LogFormat::Json => builder.json().flatten_event(true).try_init(),
        };
        if installed.is_ok() {
            std::panic::set_hook(Box::new(log_panic));
        }
    }
}

/// A panic in one handler ends one request; the log says where it was.
fn log_panic(info: &std::panic::PanicHookInfo<'_>) {
    let location = info.location().map(ToString::to_string);
    let thread = std::thread::current();
    let message = info.payload_as_str().unwrap_or("(no message)");
    tracing::error!(location, thread = thread.name(), message, "panic");
}
