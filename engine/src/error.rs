//! Every error of the engine, with a stable code that gRPC, HTTP and metrics share.

use std::{fmt, path::PathBuf, time::Duration};

use tidemill_kernels::KernelError;

/// One thing that is wrong with one field of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field as on the wire, e.g. `sampling.temperature`.
    pub field: &'static str,
    /// What is wrong and what is accepted.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// Coarse class of an error, mapped to gRPC status codes and HTTP statuses by the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The request itself is wrong.
    InvalidArgument,
    /// This model cannot do what was asked (no chat template, say).
    FailedPrecondition,
    /// The model asked for is not the one served.
    NotFound,
    /// A live request has this id already.
    AlreadyExists,
    /// The queue is full or too long, or the client does not read its stream.
    ResourceExhausted,
    /// Draining, shut down or failed.
    Unavailable,
    /// The same, and no restart on this device may help.
    DeviceLost,
    /// The deadline passed.
    DeadlineExceeded,
    /// Somebody aborted it, and there is nothing to give.
    Cancelled,
    /// A bug of ours, or a model that computes NaN.
    Internal,
}

/// Why a request was refused or ended without finishing.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Some fields are out of range. Lists all of them, never empty.
    #[error("invalid request: {}", .0.iter().map(Violation::to_string).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<Violation>),
    /// The loaded model has no such ability.
    #[error("{0}")]
    Unsupported(String),
    /// Another model is served here.
    #[error("model {asked:?} is not served here; this server has {served:?}")]
    ModelNotFound {
        /// What the client named.
        asked: String,
        /// What is loaded.
        served: String,
    },
    /// A running or queued request has the same id.
    #[error("a request with id {0:?} is running already; ids must be unique among live requests")]
    DuplicateId(String),
    /// What is served under this name already.
    #[error(
        "{0:?} is the name of a model or adapter that is loaded already; unload that first, or take another name"
    )]
    AdapterExists(String),
    /// Too many requests wait.
    #[error("the queue is full ({waiting} requests wait); retry in {} ms", retry_after.as_millis())]
    QueueFull {
        /// Requests that wait now.
        waiting: usize,
        /// A sensible time to wait before the next try.
        retry_after: Duration,
    },
    /// The request would have to wait, or has waited, longer than it may.
    #[error("the queue is too long: {}; retry in {} ms", overload(*.wait, *.limit), retry_after.as_millis())]
    Overloaded {
        /// What it would wait, by the present rate, or has waited.
        wait: Duration,
        /// What it may wait: the server's limit, or what its deadline leaves.
        limit: Duration,
        /// A sensible time to wait before the next try.
        retry_after: Duration,
    },
    /// The client left its stream unread for too long.
    #[error("the stream was not read for {} s; read faster or ask for fewer tokens", unread.as_secs())]
    SlowReader {
        /// How long it was parked.
        unread: Duration,
    },
    /// Too many grammars are being compiled.
    #[error("the server is compiling as many grammars as it may; try again soon")]
    CompilerBusy,
    /// The server is going down and takes no new work.
    #[error("the server is draining; send the request to another replica")]
    Draining,
    /// The engine stopped; nothing can be computed any more.
    #[error("the engine has stopped: {0}")]
    EngineStopped(String),
    /// The device answers nothing any more, and the engine has stopped.
    #[error("the device is lost: {0}")]
    DeviceLost(String),
    /// The client's deadline passed before the request finished.
    #[error("deadline exceeded after {completion_tokens} tokens")]
    DeadlineExceeded {
        /// Tokens produced until then.
        completion_tokens: usize,
    },
    /// Somebody aborted a request that gives all or nothing.
    #[error("the request was aborted")]
    Aborted,
    /// The model gave NaN, or no finite logit, for this sequence.
    #[error("the model produced no finite logits at position {position}")]
    NotFinite {
        /// Position of the token that could not be chosen.
        position: usize,
    },
    /// A completion could not keep the form that was asked for.
    #[error("the form that was asked for cannot be kept at position {position}: {detail}")]
    Unformed {
        /// Position of the token that could not be chosen.
        position: usize,
        /// Why.
        detail: String,
    },
    /// A promise of the engine was broken.
    #[error("internal error: {0}")]
    Internal(String),
}

fn overload(wait: Duration, limit: Duration) -> String {
    format!("{} ms of waiting, {} ms are allowed", wait.as_millis(), limit.as_millis())
}

impl RequestError {
    /// A refusal for one field.
    pub fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { field, message: message.into() }])
    }

    /// The class of this error.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Invalid(_) => ErrorCode::InvalidArgument,
            Self::Unsupported(_) | Self::Unformed { .. } => ErrorCode::FailedPrecondition,
            Self::ModelNotFound { .. } => ErrorCode::NotFound,
            Self::DuplicateId(_) | Self::AdapterExists(_) => ErrorCode::AlreadyExists,
            Self::QueueFull { .. }
            | Self::Overloaded { .. }
            | Self::SlowReader { .. }
            | Self::CompilerBusy => ErrorCode::ResourceExhausted,
            Self::Draining | Self::EngineStopped(_) => ErrorCode::Unavailable,
            Self::DeviceLost(_) => ErrorCode::DeviceLost,
            Self::DeadlineExceeded { .. } => ErrorCode::DeadlineExceeded,
            Self::Aborted => ErrorCode::Cancelled,
            Self::NotFinite { .. } | Self::Internal(_) => ErrorCode::Internal,
        }
    }
}

/// Why an engine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// It was shut down or failed; in words.
    Stopped(String),
    /// Its device answers nothing any more; in the driver's words.
    DeviceLost(String),
}

impl StopReason {
    /// What a request hears that the engine can no longer serve.
    pub fn error(&self) -> RequestError {
        match self {
            Self::Stopped(reason) => RequestError::EngineStopped(reason.clone()),
            Self::DeviceLost(reason) => RequestError::DeviceLost(reason.clone()),
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped(reason) | Self::DeviceLost(reason) => f.write_str(reason),
        }
    }
}

/// Why a model could not be loaded or an engine could not be started. Names the file, and the tensor where there is one.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is there but its content is wrong, or contradicts another.
    #[error("{}: {detail}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong and, where known, what to do.
        detail: String,
    },
    /// The model is of a kind that Tidemill does not implement.
    #[error("{}: {detail}", path.display())]
    Unsupported {
        /// The file that says so.
        path: PathBuf,
        /// What is not supported, and what is.
        detail: String,
    },
    /// The checkpoint has no such tensor.
    #[error("{}: tensor {tensor:?} is missing; expected shape {expected:?}", path.display())]
    MissingTensor {
        /// The file or index that should hold it.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor's shape contradicts the configuration.
    #[error("{}: tensor {tensor:?} has shape {got:?}, but config.json asks for {expected:?}", path.display())]
    TensorShape {
        /// The file that holds it.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// The shape in the file.
        got: Vec<usize>,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// An engine option contradicts the model or another option.
    #[error("{option}: {detail}")]
    Option {
        /// The option as on the command line.
        option: &'static str,
        /// What is wrong and what is accepted.
        detail: String,
    },
    /// The device refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl LoadError {
    /// Whether the device was lost while the model was loaded.
    pub fn is_device_lost(&self) -> bool {
        matches!(self, Self::Kernel(KernelError::DeviceLost { .. }))
    }
}
