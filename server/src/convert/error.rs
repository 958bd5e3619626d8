//! Errors of the engine as gRPC statuses with details. Nothing internal leaks, nothing outgrows a client's header limit.

use tidemill_engine::{ErrorCode, RequestError, Violation, ids::RequestId};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::grpc::panics::INTERNAL;

/// Most field violations that one status carries.
const MAX_VIOLATIONS: usize = 8;
/// Longest message in bytes. Clients accept some 8 KiB of headers, and percent-encoding can triple a message.
const MAX_MESSAGE_BYTES: usize = 512;

/// Whose reasons they are, in `google.rpc.ErrorInfo`.
const DOMAIN: &str = "tidemill";
/// The reason in a status of an engine that a restart on the same device may not help.
pub const DEVICE_LOST: &str = "DEVICE_LOST";

/// The code of a class of errors.
pub fn code(error: ErrorCode) -> Code {
    match error {
        ErrorCode::InvalidArgument => Code::InvalidArgument,
        ErrorCode::FailedPrecondition => Code::FailedPrecondition,
        ErrorCode::NotFound => Code::NotFound,
        ErrorCode::AlreadyExists => Code::AlreadyExists,
        ErrorCode::ResourceExhausted => Code::ResourceExhausted,
        ErrorCode::Unavailable | ErrorCode::DeviceLost => Code::Unavailable,
        ErrorCode::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorCode::Cancelled => Code::Cancelled,
        ErrorCode::Internal => Code::Internal,
    }
}

/// A status code as the gRPC specification writes it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The status of an error, for the request with this id.
pub fn status(error: &RequestError, id: &RequestId) -> Status {
    let code = code(error.code());
    let mut details = ErrorDetails::new();
    if id.as_str().len() <= RequestId::MAX_BYTES {
        details.set_request_info(id.as_str(), "");
    }
    let message = match error {
        RequestError::Invalid(violations) => {
            return invalid(violations, details);
        }
        RequestError::QueueFull { retry_after, .. } | RequestError::Overloaded { retry_after, .. } => {
            details.set_retry_info(Some(*retry_after));
            error.to_string()
        }
        // Reasons and panics are for the log.
        RequestError::EngineStopped(reason) => {
            tracing::error!(request_id = ?id.as_str(), reason, "the engine has stopped");
            "the engine has stopped; send the request to another replica".into()
        }
        RequestError::DeviceLost(reason) => {
            tracing::error!(request_id = ?id.as_str(), reason, "the device is lost");
            // The status is that of an engine which may come back; this one may not.
            details.set_error_info(DEVICE_LOST, DOMAIN, []);
            "the device is lost; send the request to another replica".into()
        }
        RequestError::Internal(reason) => {
            tracing::error!(request_id = ?id.as_str(), reason, "internal error");
            INTERNAL.into()
        }
        other => other.to_string(),
    };
    Status::with_error_details(code, shortened(&message), details)
}

fn invalid(violations: &[Violation], mut details: ErrorDetails) -> Status {
    let shown = &violations[..violations.len().min(MAX_VIOLATIONS)];
    for violation in shown {
        details.add_bad_request_violation(violation.field, shortened(&violation.message));
    }
    let lines: Vec<String> = shown.iter().map(Violation::to_string).collect();
    let message = shortened(&lines.join("; "));
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// At most [`MAX_MESSAGE_BYTES`] of a text, cut at a character.
fn shortened(text: &str) -> String {
    if text.len() <= MAX_MESSAGE_BYTES {
        return text.to_owned();
    }
    let mut end = MAX_MESSAGE_BYTES;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_status_fits_into_a_clients_header_list_whatever_the_error_holds() {
        let id = RequestId::new("r");
        let asked = "é".repeat(1 << 20);
        let violations = vec![Violation { field: "sampling.logit_bias", message: "é".repeat(4000) }; 1024];
        for error in
            [RequestError::ModelNotFound { asked, served: "m".into() }, RequestError::Invalid(violations)]
        {
            let status = status(&error, &id);
            assert!(status.message().len() <= MAX_MESSAGE_BYTES + 3);
            assert!(status.details().len() < 5 << 10, "{}", status.details().len());
        }
    }

    #[test]
    fn overload_says_when_to_retry_and_a_slow_reader_is_not_told_to() {
        let id = RequestId::new("r");
        let (wait, limit) = (Duration::from_secs(3), Duration::from_secs(2));
        let retry_after = Duration::from_millis(700);
        for error in [
            RequestError::QueueFull { waiting: 9, retry_after },
            RequestError::Overloaded { wait, limit, retry_after },
        ] {
            let status = status(&error, &id);
            assert_eq!(status.code(), Code::ResourceExhausted);
            assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(retry_after), "{status:?}");
        }
        let status = status(&RequestError::SlowReader { unread: Duration::from_secs(60) }, &id);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.get_details_retry_info().is_none(), "the same client would be as slow again");
        assert!(status.message().contains("60 s"), "{status:?}");
    }

    #[test]
    fn reasons_and_panics_do_not_leave_the_server() {
        let id = RequestId::new("r");
        for kind in [RequestError::Internal, RequestError::EngineStopped, RequestError::DeviceLost] {
            let error = kind("secret".into());
            let status = status(&error, &id);
            assert!(!status.message().contains("secret"), "{status:?}");
        }
    }
}
