//! Server-sent events, written as bytes: an event of a stream costs one serialisation and no more.

use std::convert::Infallible;

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use futures_util::{Stream, StreamExt, TryStreamExt};
use serde::Serialize;

use super::gather::Gathered;
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

/// Stands for the text while what is around it is written for the first time. Nothing else in an event looks like it.
const HOLE: &str = "\0";
/// The same as JSON.
const HOLE_JSON: &[u8] = b"\"\\u0000\"";

/// Events of which, by index, only one text differs from one to the next: what is around it is written once and copied from then on.
#[derive(Debug, Default)]
pub struct Templates(Vec<Option<Template>>);

#[derive(Debug)]
struct Template {
    before: Vec<u8>,
    after: Vec<u8>,
}

impl Templates {
    /// Appends the event that `make` appends for this index and text.
    pub fn write(
        &mut self,
        buffer: &mut Vec<u8>,
        index: usize,
        text: &str,
        make: impl FnOnce(&mut Vec<u8>, &str),
    ) {
        if self.0.len() <= index {
            self.0.resize_with(index + 1, || None);
        }
        let template = self.0[index].get_or_insert_with(|| {
            let mut event = Vec::new();
            make(&mut event, HOLE);
            Template::around_hole(event)
        });
        buffer.extend_from_slice(&template.before);
        json(buffer, &text);
        buffer.extend_from_slice(&template.after);
    }
}

impl Template {
    fn around_hole(mut event: Vec<u8>) -> Self {
        let hole = event.windows(HOLE_JSON.len()).rposition(|place| place == HOLE_JSON);
        let hole = hole.unwrap_or_else(|| unreachable!("an event holds its text"));
        let after = event.split_off(hole + HOLE_JSON.len());
        event.truncate(hole);
        Self { before: event, after }
    }
}

/// A stream of events as a response that nothing on the way may hold back.
pub fn response(events: impl Stream<Item = Vec<u8>> + Send + 'static) -> Response {
    let frames = Gathered::new(events.map(Ok::<_, Infallible>));
    with_headers("text/event-stream; charset=utf-8", Body::from_stream(frames))
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
    E: Into<CallError> + Send + 'static,
{
    let frames = Gathered::new(chunks).map_err(|error| {
        let error: CallError = error.into();
        std::io::Error::other(error.message)
    });
    with_headers(kind, Body::from_stream(frames))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_template_gives_the_same_bytes() {
        let mut templates = Templates::default();
        for text in ["a", "", "\0", "\"\\u0000\"", "line\nline", "é🦊", "</script>"] {
            for index in [1, 0] {
                let make = |buffer: &mut Vec<u8>, text: &str| {
                    data(buffer, &json!({"id": "\\u0000", "index": index, "text": text, "usage": null}));
                };
                let (mut expected, mut written) = (b"before".to_vec(), b"before".to_vec());
                make(&mut expected, text);
                templates.write(&mut written, index, text, make);
                assert_eq!(String::from_utf8(written), String::from_utf8(expected));
            }
        }
    }
}
