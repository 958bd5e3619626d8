//! Statuses as errors of calls.

use std::error::Error;

use tidemill_engine::ErrorCode;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{client::CallError, convert::error::DEVICE_LOST};

/// What a status of the engine says. One that the connection made is of an engine that cannot be reached.
pub fn call_error(status: &Status) -> CallError {
    call_error_of(status, |field| field)
}

/// The same where fields have other names on this side.
pub fn call_error_of(status: &Status, name: impl Fn(&str) -> &str) -> CallError {
    if status.source().is_some() {
        tracing::debug!(%status, "the connection to the engine");
        return CallError::unreachable();
    }
    let code = match status.code() {
        Code::InvalidArgument | Code::OutOfRange => ErrorCode::InvalidArgument,
        Code::FailedPrecondition | Code::Unimplemented => ErrorCode::FailedPrecondition,
        Code::NotFound => ErrorCode::NotFound,
        Code::AlreadyExists => ErrorCode::AlreadyExists,
        Code::ResourceExhausted => ErrorCode::ResourceExhausted,
        Code::DeadlineExceeded => ErrorCode::DeadlineExceeded,
        Code::Cancelled => ErrorCode::Cancelled,
        Code::Unavailable | Code::Aborted if is_device_lost(status) => ErrorCode::DeviceLost,
        Code::Unavailable | Code::Aborted => ErrorCode::Unavailable,
        // The client is not to blame for the gateway's key.
        Code::Unauthenticated | Code::PermissionDenied => {
            tracing::error!(%status, "the engine does not let this gateway in; see --engine-api-key");
            return CallError::unreachable();
        }
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => ErrorCode::Internal,
    };
    let retry_after = status.get_details_retry_info().and_then(|info| info.retry_delay);
    let violations = status.get_details_bad_request().map(|bad| bad.field_violations).unwrap_or_default();
    if violations.is_empty() {
        return CallError { retry_after, ..CallError::new(code, status.message()) };
    }
    let pairs = violations.iter().map(|violation| (name(&violation.field), violation.description.as_str()));
    CallError::invalid(code, pairs)
}

fn is_device_lost(status: &Status) -> bool {
    status.get_details_error_info().is_some_and(|info| info.reason == DEVICE_LOST)
}
