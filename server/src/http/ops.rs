//! `/health`, `/ready`, `/metrics`: for probes and dashboards.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use serde_json::json;

use super::{ApiError, App, Call, json_response, metrics};
use crate::grpc::Phase;

/// Whether the process is worth keeping: not when its engine has died or hangs. Loading and draining are healthy.
pub async fn health(app: App, _: &mut Call) -> Result<Response, ApiError> {
    let phase = app.engine.phase();
    let healthy = match phase {
        Phase::Loading | Phase::Draining => true,
        Phase::Ready => app.engine.is_healthy(),
        Phase::Stopped => false,
    };
    Ok(status(healthy, phase))
}

/// Whether requests are served.
pub async fn ready(app: App, _: &mut Call) -> Result<Response, ApiError> {
    Ok(status(app.engine.is_healthy(), app.engine.phase()))
}

fn status(good: bool, phase: Phase) -> Response {
    let word = match phase {
        Phase::Loading => "loading",
        Phase::Ready if good => "ready",
        Phase::Ready => "stalled",
        Phase::Draining => "draining",
        Phase::Stopped => "stopped",
    };
    let mut response = json_response(&json!({ "status": word }));
    if !good {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

/// Prometheus metrics.
pub async fn metrics(app: App, _: &mut Call) -> Result<Response, ApiError> {
    let model = app.model()?;
    let text = metrics::text(&model, app.engine.stats().await?);
    let mut response = Response::new(Body::from(text));
    let kind = HeaderValue::from_static(metrics::CONTENT_TYPE);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}
