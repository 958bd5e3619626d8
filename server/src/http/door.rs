//! What every request passes: credentials first, then its handler, whose panics end it alone; an id on every reply.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Instant};

use axum::{
    RequestExt,
    extract::{RawPathParams, Request, State},
    http::{StatusCode, Uri},
    middleware::Next,
    response::Response,
};
use futures_util::FutureExt;
use tidemill_engine::ids::RequestId;

use super::{
    ApiError, App, Call, Family,
    call::{self, REQUEST_ID},
    routes::{Access, Handler, table},
};
use crate::{auth::Credential, grpc::panics::INTERNAL};

/// The paths that need no key, and the state.
#[derive(Debug, Clone)]
pub struct Door {
    app: App,
    open: Arc<[String]>,
}

impl Door {
    /// The door of a server: what the table does not call open is closed.
    pub fn new(app: App) -> Self {
        let open = table().into_iter().filter(|route| route.access == Access::Open);
        Self { app, open: open.map(|route| route.path).collect() }
    }
}

/// Lets a request pass or answers 401.
pub async fn guard(State(door): State<Door>, mut request: Request, next: Next) -> Response {
    let keys = &door.app.keys;
    let path = request.uri().path();
    if !keys.is_empty() {
        match keys.admit(request.headers()) {
            Some(credential) => drop(request.extensions_mut().insert(credential)),
            None if door.open.iter().any(|open| open == path) => {}
            None => {
                let message = "this server wants an API key: send `authorization: Bearer KEY`, \
                               `authorization: Api-Key KEY` or `x-api-key: KEY`";
                let error = ApiError {
                    code: Some("invalid_api_key"),
                    ..ApiError::new(StatusCode::UNAUTHORIZED, message)
                };
                let (family, id) = (family_of(request.uri()), RequestId::random());
                Call::log(request.method(), path, &id, error.status, Instant::now());
                return stamped(error.response(family, &id), &id, family);
            }
        }
    }
    next.run(request).await
}

/// Serves a request of a route.
pub async fn serve(app: App, family: Family, run: Handler, mut request: Request) -> Response {
    let started = Instant::now();
    let path_param =
        request.extract_parts::<RawPathParams>().await.ok().and_then(|params| {
            params.iter().find(|(name, _)| *name == "id").map(|(_, value)| value.to_owned())
        });
    let (parts, body) = request.into_parts();
    let credential = parts.extensions.get::<Credential>().cloned().unwrap_or_else(|| Credential("".into()));
    let path = parts.uri.path().to_owned();
    let mut call = Call::new(parts, body, credential, family, app.max_body_bytes);
    call.path_param = path_param;
    let response = match AssertUnwindSafe(run(app, &mut call)).catch_unwind().await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => error.response(family, &call.id),
        Err(_) => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, INTERNAL).response(family, &call.id),
    };
    Call::log(call.method(), &path, &call.id, response.status(), started);
    stamped(response, &call.id, family)
}

fn stamped(mut response: Response, id: &RequestId, family: Family) -> Response {
    if !response.headers().contains_key(REQUEST_ID) {
        call::stamp(&mut response, id, family);
    }
    response
}

/// There is no such path.
pub async fn not_found(uri: Uri) -> Response {
    let message = format!("there is no {}; GET /openapi.json lists what there is", uri.path());
    let (id, family) = (RequestId::random(), family_of(&uri));
    stamped(ApiError::not_found(message).response(family, &id), &id, family)
}

/// The path is there, the method is not.
pub async fn method_not_allowed(uri: Uri) -> Response {
    let message = format!("{} does not have this method; GET /openapi.json lists what there is", uri.path());
    let (id, family) = (RequestId::random(), family_of(&uri));
    let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message);
    stamped(error.response(family, &id), &id, family)
}

/// Whose conventions a path follows, where no route says so.
fn family_of(uri: &Uri) -> Family {
    match uri.path() {
        path if path.contains("/v1/messages") => Family::Anthropic,
        path if path.contains("/v1/") => Family::OpenAi,
        _ => Family::Plain,
    }
}
