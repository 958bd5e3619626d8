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

#[cfg(test)]
mod tests {
    use axum::{Router, body::Body, middleware, routing::any};
    use tonic::{Code, codegen::Service};

    use super::*;

    #[tokio::test]
    async fn a_handler_that_panics_answers_internal_and_the_next_call_is_served() {
        let broken = any(|| async {
            let text = "a bug with a secret";
            assert!(text.is_empty(), "{text}");
        });
        let sound = any(|| async { Status::ok("fine").into_http::<Body>() });
        let mut router: Router =
            Router::new().route("/broken", broken).route("/sound", sound).layer(middleware::from_fn(guard));
        for (path, code) in [("/broken", Code::Internal), ("/sound", Code::Ok)] {
            let request = Request::builder().uri(path).body(Body::empty()).unwrap();
            let response = router.call(request).await.unwrap();
            let status = Status::from_header_map(response.headers()).unwrap();
            assert_eq!(status.code(), code, "{path}");
            assert!(!status.message().contains("secret"));
        }
    }
}
