//! Credentials: with keys configured, every path but health checks is closed without one.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::HeaderMap,
    middleware::Next,
    response::Response,
};
use subtle::{Choice, ConstantTimeEq};
use tonic::Status;

use super::refusal;
use crate::exit::Failure;

/// The keys that clients may present. Their values are never shown.
#[derive(Clone, Default)]
pub struct ApiKeys(Arc<[String]>);

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

impl ApiKeys {
    /// Checks that the keys can be sent in a header.
    ///
    /// # Errors
    /// Wrong usage for a key that is empty or not printable ASCII without spaces.
    pub fn new(keys: Vec<String>) -> Result<Self, Failure> {
        for key in &keys {
            if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(Failure::usage(
                    "--api-key: a key must be printable ASCII without spaces, and not empty",
                ));
            }
        }
        Ok(Self(keys.into()))
    }

    /// Whether everyone is let in.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a request with these headers may pass. Which key differs where is not to be learnt from the time it
    /// takes; the length of a key may be.
    fn admits(&self, headers: &HeaderMap) -> bool {
        let Some(presented) = credential(headers) else { return false };
        let equal = |key: &String| key.as_bytes().ct_eq(presented);
        self.0.iter().map(equal).fold(Choice::from(0), |any, one| any | one).into()
    }
}

/// `authorization: Bearer KEY`, `authorization: Api-Key KEY` or `x-api-key: KEY`.
fn credential(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(key) = headers.get("x-api-key") {
        return Some(key.as_bytes());
    }
    let value = headers.get("authorization")?.as_bytes();
    let space = value.iter().position(|&byte| byte == b' ')?;
    let (scheme, key) = value.split_at(space);
    let known = scheme.eq_ignore_ascii_case(b"bearer") || scheme.eq_ignore_ascii_case(b"api-key");
    known.then(|| key.trim_ascii())
}

/// Paths that stay open, so that probes need no credentials.
const OPEN: &str = "/grpc.health.v1.Health/";

/// Lets a request pass or answers UNAUTHENTICATED. New services are closed unless they are listed as open here.
pub async fn guard(State(keys): State<ApiKeys>, request: Request, next: Next) -> Response {
    if keys.is_empty() || request.uri().path().starts_with(OPEN) || keys.admits(request.headers()) {
        return next.run(request).await;
    }
    tracing::info!(path = ?request.uri().path(), status = "UNAUTHENTICATED", "rpc");
    refusal(Status::unauthenticated(
        "this server wants an API key: send `authorization: Bearer KEY` or `x-api-key: KEY`",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(axum::http::HeaderName::from_static(name), value.parse().unwrap())])
    }

    #[test]
    fn all_three_forms_carry_the_same_key_and_nothing_else_passes() {
        let keys = ApiKeys::new(vec!["other".into(), "s3cret".into()]).unwrap();
        for (name, value) in [
            ("authorization", "Bearer s3cret"),
            ("authorization", "bearer  s3cret"),
            ("authorization", "Api-Key s3cret"),
            ("x-api-key", "s3cret"),
        ] {
            assert!(keys.admits(&headers(name, value)), "{name}: {value}");
        }
        for (name, value) in [
            ("authorization", "s3cret"),
            ("authorization", "Basic s3cret"),
            ("authorization", "Bearer s3cre"),
            ("authorization", "Bearer s3cret2"),
            ("authorization", "Bearer "),
            ("x-api-key", ""),
            ("cookie", "s3cret"),
        ] {
            assert!(!keys.admits(&headers(name, value)), "{name}: {value}");
        }
        assert!(!keys.admits(&HeaderMap::new()));
    }

    #[test]
    fn keys_that_no_client_could_send_are_refused_at_start() {
        for key in ["", "with space", "ümlaut", "new\nline"] {
            assert!(ApiKeys::new(vec![key.into()]).is_err(), "{key:?}");
        }
    }
}
