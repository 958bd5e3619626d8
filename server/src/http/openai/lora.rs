//! `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`: as vLLM has them, but paths are below the server's own folder.

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::http::{ApiError, App, Call};

/// What to load.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct LoadLoraFields {
    /// The name that requests will use.
    pub lora_name: String,
    /// A folder below the server's `--lora-dir`, relative to it.
    pub lora_path: String,
}

/// What to unload.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct UnloadLoraFields {
    /// Its name.
    pub lora_name: String,
}

/// Loads an adapter.
pub async fn load(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let LoadLoraFields { lora_name, lora_path } = call.json().await?;
    let said = success("added", &lora_name);
    match app.engine.load_adapter(lora_name, lora_path).await {
        Ok(()) => Ok(said),
        Err(error) => {
            let error = ApiError::from(error);
            let taken = error.status == axum::http::StatusCode::CONFLICT;
            Err(if taken { ApiError { code: Some("adapter_exists"), ..error } } else { error })
        }
    }
}

/// Unloads an adapter. Requests that named it before end with it.
pub async fn unload(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let UnloadLoraFields { lora_name } = call.json().await?;
    let said = success("removed", &lora_name);
    app.engine.unload_adapter(lora_name).await?;
    Ok(said)
}

fn success(done: &str, name: &str) -> Response {
    let mut response = Response::new(Body::from(format!(
        "Success: LoRA adapter '{}' {done} successfully.",
        name.escape_debug()
    )));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
