//! One HTTP request under way: its id, who sent it, its body.

use std::{sync::Arc, time::Instant};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header, request::Parts},
    response::Response,
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tidemill_engine::{
    ids::{RequestId, TenantId},
    request::GenerateRequest,
};

use super::{ApiError, Family};
use crate::auth::Credential;

/// Carries a request's id, both ways.
pub const REQUEST_ID: &str = "x-request-id";
/// The same where Anthropic's SDKs look for it.
const ANTHROPIC_REQUEST_ID: &str = "request-id";
/// Longest `traceparent` that is kept. Version 00 has 55 bytes; later ones may have more.
const MAX_TRACE_PARENT_BYTES: usize = 128;

/// A request that came through the door.
#[derive(Debug)]
pub struct Call {
    /// Its name: what the client put into `x-request-id`, or ours.
    pub id: RequestId,
    /// Whose conventions its route follows.
    pub family: Family,
    /// Who sent it.
    pub credential: Credential,
    /// Part of its path, where the route has a variable.
    pub path_param: Option<String>,
    /// What the client named the request, if it did.
    client_id: Option<RequestId>,
    method: Method,
    query: String,
    headers: HeaderMap,
    body: Body,
    max_body_bytes: usize,
}

impl Call {
    /// A request and what the door found out about it.
    pub fn new(parts: Parts, body: Body, credential: Credential, family: Family, limit: usize) -> Self {
        let client_id = client_id(&parts.headers);
        Self {
            id: client_id.clone().unwrap_or_else(RequestId::random),
            family,
            credential,
            path_param: None,
            client_id,
            method: parts.method,
            query: parts.uri.query().unwrap_or_default().to_owned(),
            headers: parts.headers,
            body,
            max_body_bytes: limit,
        }
    }

    /// The value of a query parameter that needs no decoding.
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query
            .split('&')
            .find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name))
            .map(|p| p.1)
    }

    /// A header's value, if it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// 415 for another content type (so that no web page can send requests without asking first), 413 for a body over the limit, 400 for
    /// what is not the JSON that the route takes.
    pub async fn json<T: DeserializeOwned>(&mut self) -> Result<T, ApiError> {
        if !is_json(&self.headers) {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "the body must be JSON: send the header `content-type: application/json`",
            ));
        }
        let bytes = self.bytes().await?;
        // All of it is read, what the route does not know included: what is no JSON is refused wherever it stands.
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| {
            ApiError::new(StatusCode::BAD_REQUEST, format!("the body is not JSON: {error}"))
        })?;
        serde_path_to_error::deserialize(value).map_err(|error| {
            let path = error.path().to_string();
            let message = format!("the body is not what this route takes: {}", error.inner());
            match path.as_str() {
                "." | "?" => ApiError::new(StatusCode::BAD_REQUEST, message),
                _ => ApiError::invalid(path, message),
            }
        })
    }

    async fn bytes(&mut self) -> Result<Bytes, ApiError> {
        let limit = self.max_body_bytes;
        let too_large = || {
            let message = format!("the body is larger than {limit} bytes; --max-body-bytes sets this limit");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
        };
        let announced = self.header("content-length").and_then(|length| length.parse::<usize>().ok());
        if announced.is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        match Limited::new(std::mem::take(&mut self.body), limit).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
            Err(_) => Err(ApiError::new(StatusCode::BAD_REQUEST, "the body ended before it was complete")),
        }
    }

    /// Fills in what a request's headers say beside its body. `request_id` is the body's own name for it.
    ///
    /// # Errors
    /// 400 for a name that is none.
    pub fn stamp(
        &mut self,
        request: &mut GenerateRequest,
        request_id: Option<String>,
    ) -> Result<(), ApiError> {
        if let Some(id) = request_id {
            if !is_id(&id) {
                return Err(ApiError::invalid("request_id", "must be 1 to 256 visible ASCII characters"));
            }
            self.id = RequestId::new(id);
        } else if let Some(id) = &self.client_id {
            self.id = id.clone();
        }
        request.id = Some(self.id.clone());
        request.credential = self.credential.0.clone();
        if request.tenant.as_str().is_empty() {
            request.tenant = TenantId::new(self.credential.0.clone());
        }
        let trace_parent = self.header("traceparent").filter(|value| value.len() <= MAX_TRACE_PARENT_BYTES);
        request.trace_parent = trace_parent.map(Into::into);
        Ok(())
    }

    /// The log line of a request that has been answered; its stream may go on.
    pub fn log(method: &Method, path: &str, id: &RequestId, status: StatusCode, started: Instant) {
        let duration_ms = started.elapsed().as_micros() as f64 / 1e3;
        let (status, id) = (status.as_u16(), id.as_str());
        // Requests to the model have a line of their own life; scrapers and probes ask every second.
        if status < 400 {
            tracing::debug!(%method, ?path, request_id = ?id, status, duration_ms, "http");
        } else {
            tracing::info!(%method, ?path, request_id = ?id, status, duration_ms, "http");
        }
    }

    /// Its method.
    pub fn method(&self) -> &Method {
        &self.method
    }
}

fn client_id(headers: &HeaderMap) -> Option<RequestId> {
    let id = headers.get(REQUEST_ID)?.to_str().ok()?;
    is_id(id).then(|| RequestId::new(id))
}

fn is_id(id: &str) -> bool {
    (1..=RequestId::MAX_BYTES).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        return false;
    };
    let kind = value.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("application/json")
}

/// Puts the id on a response.
pub fn stamp(response: &mut Response, id: &RequestId, family: Family) {
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        if family == Family::Anthropic {
            response.headers_mut().insert(ANTHROPIC_REQUEST_ID, value.clone());
        }
        response.headers_mut().insert(REQUEST_ID, value);
    }
}

/// A JSON response.
pub fn json_response(value: &impl serde::Serialize) -> Response {
    let body =
        serde_json::to_vec(value).unwrap_or_else(|error| unreachable!("our own types serialise: {error}"));
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// What all handlers share.
pub type App = Arc<super::app::AppState>;
