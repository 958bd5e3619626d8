//! How the program ends: exit codes, and errors that carry one.

use std::{fmt, process::ExitCode};

use tidemill_engine::{ErrorCode, LoadError, RequestError};

/// Why the program ended. The numbers are documented in `--help`, and supervisors rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Something failed while running.
    Failure = 1,
    /// The command line, the environment or the configuration file is wrong.
    Usage = 2,
    /// The model cannot be loaded.
    Model = 3,
    /// The address cannot be bound.
    Bind = 4,
    /// The engine died while serving.
    EngineDied = 5,
    /// The device answers nothing any more: a restart may need another device.
    DeviceLost = 6,
    /// Ended by a signal before it was done.
    Interrupted = 130,
}

/// The exit codes in words, for `--help`.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done; for `serve` and `gateway`: drained after SIGTERM or SIGINT
  1    failure at run time
  2    wrong usage: command line, environment or configuration file
  3    the model cannot be loaded
  4    the address cannot be bound
  5    the engine died while serving
  6    the device was lost (a GPU error that no retry can mend)
  130  interrupted (second signal of `serve` and `gateway`; Ctrl-C of the others)";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error that ends the program: one line for people and a code for supervisors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What went wrong and what to do; no line breaks.
    pub message: String,
}

impl Failure {
    /// An error with its exit code. Line breaks become spaces.
    pub fn new(exit: Exit, message: impl fmt::Display) -> Self {
        let message = message.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Self { exit, message }
    }

    /// Wrong usage.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// A failure at run time.
    pub fn runtime(message: impl fmt::Display) -> Self {
        Self::new(Exit::Failure, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)
    }
}

impl std::error::Error for Failure {}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        match &error {
            // An option that only the model's sizes show to be wrong is still wrong usage.
            LoadError::Option { option, .. } if option.starts_with("--") => Self::usage(error),
            _ if error.is_device_lost() => Self::new(Exit::DeviceLost, error),
            _ => Self::new(Exit::Model, error),
        }
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        match error.code() {
            ErrorCode::InvalidArgument | ErrorCode::FailedPrecondition => Self::usage(error),
            ErrorCode::DeviceLost => Self::new(Exit::DeviceLost, error),
            _ => Self::runtime(error),
        }
    }
}

/// An error and its causes in one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
