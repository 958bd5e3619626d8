//! The door of the gRPC port: with keys configured, every path but health checks is closed without one.

use axum::{
    extract::{Request as HttpRequest, State},
    middleware::Next,
    response::Response,
};
use tonic::Status;

use super::refusal;
pub use crate::auth::{ApiKeys, Credential};

/// Paths that stay open, so that probes need no credentials.
const OPEN: &str = "/grpc.health.v1.Health/";

/// Lets a request pass or answers UNAUTHENTICATED. New services are closed unless they are listed as open here.
pub async fn guard(State(keys): State<ApiKeys>, mut request: HttpRequest, next: Next) -> Response {
    if keys.is_empty() || request.uri().path().starts_with(OPEN) {
        return next.run(request).await;
    }
    if let Some(credential) = keys.admit(request.headers()) {
        request.extensions_mut().insert(credential);
        return next.run(request).await;
    }
    tracing::info!(path = ?request.uri().path(), status = "UNAUTHENTICATED", "rpc");
    refusal(Status::unauthenticated(
        "this server wants an API key: send `authorization: Bearer KEY` or `x-api-key: KEY`",
    ))
}
