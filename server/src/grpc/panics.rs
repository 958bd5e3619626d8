//! A panic in one handler ends one request: the client gets INTERNAL, the process lives on.

use std::panic::AssertUnwindSafe;

use axum::{extract::Request, middleware::Next, response::Response};
use futures_util::FutureExt;
use tonic::Status;

use super::refusal;

/// What a client learns about a bug of ours. The log has the rest.
pub const INTERNAL: &str = "internal error; the server's log says more under this request's id";

/// Answers INTERNAL when a handler panics.
pub async fn guard(request: Request, next: Next) -> Response {
    match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => refusal(Status::internal(INTERNAL)),
    }
}
