//! Why a call failed, in terms that HTTP and gRPC share.

use std::time::Duration;

use tidemill_engine::{ErrorCode, RequestError};

use crate::grpc::panics::INTERNAL;

/// Most violations that an answer carries.
const MAX_VIOLATIONS: usize = 8;

/// An error of the engine, fit for clients: nothing internal is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallError {
    /// Its class.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
    /// The first field that is wrong, in the engine's terms (`sampling.temperature`), if one is.
    pub field: Option<String>,
    /// A sensible time to wait before the next try.
    pub retry_after: Option<Duration>,
}

impl CallError {
    /// An error without details.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), field: None, retry_after: None }
    }

    /// The model is not there yet.
    pub fn loading() -> Self {
        Self::new(ErrorCode::Unavailable, "the model is loading; try again in a moment")
    }

    /// The engine is elsewhere and does not answer.
    pub fn unreachable() -> Self {
        Self::new(
            ErrorCode::Unavailable,
            "the engine cannot be reached, or its model is loading; try again in a moment",
        )
    }

    /// Fields that are wrong, each with what is wrong with it.
    pub fn invalid<'a>(code: ErrorCode, violations: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let mut violations = violations.take(MAX_VIOLATIONS).peekable();
        let field = violations.peek().map(|&(field, _)| field.to_owned());
        let shown: Vec<String> = violations.map(|(field, message)| public_name(field, message)).collect();
        Self { field, ..Self::new(code, shown.join("; ")) }
    }

    /// A bug of ours; `reason` is for the log alone.
    pub fn internal(reason: &str) -> Self {
        tracing::error!(reason, "internal error");
        Self::new(ErrorCode::Internal, INTERNAL)
    }
}

impl From<RequestError> for CallError {
    fn from(error: RequestError) -> Self {
        let code = error.code();
        let plain = |message: &str| Self::new(code, message);
        match &error {
            RequestError::Invalid(violations) => {
                Self::invalid(code, violations.iter().map(|v| (v.field, v.message.as_str())))
            }
            RequestError::QueueFull { retry_after, .. } | RequestError::Overloaded { retry_after, .. } => {
                Self { retry_after: Some(*retry_after), ..plain(&error.to_string()) }
            }
            // Reasons are for the log.
            RequestError::EngineStopped(reason) => {
                tracing::error!(reason, "the engine has stopped");
                plain("the engine has stopped; send the request to another replica")
            }
            RequestError::DeviceLost(reason) => {
                tracing::error!(reason, "the device is lost");
                plain("the device is lost; send the request to another replica")
            }
            RequestError::Internal(reason) => Self::internal(reason),
            other => plain(&other.to_string()),
        }
    }
}

fn public_name(field: &str, message: &str) -> String {
    format!("{}: {message}", field.strip_prefix("sampling.").unwrap_or(field))
}
