//! Server-sent events, written as bytes: an event of a stream costs one serialisation and no more.

use std::convert::Infallible;

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, header},
    response::Response,
};
use futures_util::{Stream, StreamExt};
use serde::Serialize;

use crate::client::CallError;

/// Appends an event that has data only (OpenAI).
pub fn data(buffer: &mut Vec<u8>, value: &impl Serialize) {
    buffer.extend_from_slice(b"data: ");
    json(buffer, value);
    buffer.extend_from_slice(b"\n\n");
}

/// Appends an event with a name (Anthropic, OpenAI's responses).
pub fn event(buffer: &mut Vec<u8>, name: &str, value: &impl Serialize) {
    buffer.extend_from_slice(b"event: ");
    buffer.extend_from_slice(name.as_bytes());
    buffer.extend_from_slice(b"\n");
    data(buffer, value);
}

/// Appends OpenAI's end of a stream.
pub fn done(buffer: &mut Vec<u8>) {
    buffer.extend_from_slice(b"data: [DONE]\n\n");
}

fn json(buffer: &mut Vec<u8>, value: &impl Serialize) {
    // serde_json writes no line breaks, so one event is one line.
    let written = serde_json::to_writer(&mut *buffer, value);
    debug_assert!(written.is_ok(), "our own types serialise into memory");
}

/// A stream of events as a response.
pub fn response(events: impl Stream<Item = Vec<u8>> + Send + 'static) -> Response {
    streamed("text/event-stream; charset=utf-8", events)
}

/// A stream of bytes as a response that nothing on the way may hold back.
pub fn streamed(kind: &'static str, chunks: impl Stream<Item = Vec<u8>> + Send + 'static) -> Response {
    let chunks = chunks.map(|chunk| Ok::<_, Infallible>(Bytes::from(chunk)));
    with_headers(kind, Body::from_stream(chunks))
}

fn with_headers(kind: &'static str, body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// A stream of bytes in which an error can only be shown by an end that is none: the connection closes before the last chunk.
pub fn broken_off<E>(
    kind: &'static str,
    chunks: impl Stream<Item = Result<Vec<u8>, E>> + Send + 'static,
) -> Response
where
    E: Into<CallError> + 'static,
{
    let chunks = chunks.map(|chunk| {
        chunk.map(Bytes::from).map_err(|error| {
            let error: CallError = error.into();
            std::io::Error::other(error.message)
        })
    });
    with_headers(kind, Body::from_stream(chunks))
}
