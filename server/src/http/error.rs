//! Errors in the shape of the family that was called.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use serde_json::{Value, json};
use tidemill_engine::{ErrorCode, ids::RequestId};

use crate::client::CallError;

/// Whose conventions a route follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// OpenAI's API, and what vLLM adds to it.
    OpenAi,
    /// Anthropic's API.
    Anthropic,
    /// Model servers, operations.
    Plain,
}

/// Why a request was not served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// For people.
    pub message: String,
    /// The field that is wrong, in the client's terms.
    pub param: Option<String>,
    /// A stable word for programs.
    pub code: Option<&'static str>,
    /// A sensible time to wait before the next try.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// An error without details.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// 400 for one field.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// 404 for something that is not there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// The same in the words of a family that calls fields otherwise: pairs of our name, or the end of one, and theirs.
    pub fn renamed(mut self, names: &[(&str, &str)]) -> Self {
        for &(ours, theirs) in names {
            if let Some(param) = self.param.as_deref()
                && let Some(place) = param.strip_suffix(ours)
                && (place.is_empty() || ours.starts_with('.'))
            {
                self.param = Some(format!("{place}{theirs}"));
            }
            let (at_start, later) = (format!("{ours}: "), format!("; {ours}: "));
            if let Some(rest) = self.message.strip_prefix(&at_start) {
                self.message = format!("{theirs}: {rest}");
            }
            self.message = self.message.replace(&later, &format!("; {theirs}: "));
        }
        self
    }

    /// The body in the family's shape.
    pub fn body(&self, family: Family, id: &RequestId) -> Value {
        match family {
            Family::OpenAi => json!({"error": {
                "message": self.message_with_param(),
                "type": self.openai_type(),
                "param": self.param,
                "code": self.code,
            }}),
            Family::Anthropic => json!({
                "type": "error",
                "error": {"type": self.anthropic_type(), "message": self.message_with_param()},
                "request_id": id.as_str(),
            }),
            Family::Plain => json!({"error": self.message_with_param(), "code": self.code}),
        }
    }

    fn message_with_param(&self) -> String {
        match &self.param {
            Some(param) if !self.message.contains(param.as_str()) => format!("{param}: {}", self.message),
            _ => self.message.clone(),
        }
    }

    fn openai_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            503 => "service_unavailable_error",
            504 => "timeout_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    fn anthropic_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }

    /// The whole response.
    pub fn response(&self, family: Family, id: &RequestId) -> Response {
        let mut response = Response::new(Body::from(self.body(family, id).to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(wait) = self.retry_after {
            // Whole seconds are all that the header knows; clients shall not come too early.
            let seconds = wait.as_millis().div_ceil(1000).max(1) as u64;
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<CallError> for ApiError {
    fn from(error: CallError) -> Self {
        let (status, code) = match error.code {
            ErrorCode::InvalidArgument => (StatusCode::BAD_REQUEST, "invalid_value"),
            ErrorCode::FailedPrecondition => (StatusCode::BAD_REQUEST, "not_supported"),
            ErrorCode::NotFound => (StatusCode::NOT_FOUND, "model_not_found"),
            ErrorCode::AlreadyExists => (StatusCode::CONFLICT, "duplicate_request_id"),
            ErrorCode::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            ErrorCode::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            ErrorCode::DeviceLost => (StatusCode::SERVICE_UNAVAILABLE, "device_lost"),
            ErrorCode::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded"),
            ErrorCode::Cancelled => (aborted(), "request_aborted"),
            ErrorCode::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal_error"),
        };
        Self {
            param: error.field.map(|field| public_field(&field)),
            code: Some(code),
            retry_after: error.retry_after,
            ..Self::new(status, error.message)
        }
    }
}

/// Somebody ended the request. nginx's status for that, which no client takes for something to try again.
fn aborted() -> StatusCode {
    StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST)
}

/// The client's name of a field of the engine.
fn public_field(field: &str) -> String {
    match field {
        "prompt.chat" | "chat" => "messages".to_owned(),
        "prompt.text" | "prompt.token_ids" => "prompt".to_owned(),
        "sampling.logprobs" => "logprobs".to_owned(),
        "structured" => "response_format".to_owned(),
        other => other.strip_prefix("sampling.").unwrap_or(other).to_owned(),
    }
}
