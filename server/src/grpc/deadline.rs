//! `grpc-timeout`: read for every RPC and kept until its headers go out; the engine keeps it for the stream.

use std::time::{Duration, Instant};

use axum::{extract::Request, middleware::Next, response::Response};
use tonic::Status;

use super::refusal;

/// When the client stops waiting. In the extensions of a request that has a `grpc-timeout`.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(pub Instant);

/// The transport has a timer of its own for the time before the headers, and answers CANCELLED. Ours fires this much
/// earlier (its granularity is a millisecond), so that clients get the status that they expect.
const MARGIN: Duration = Duration::from_millis(3);

/// Reads the deadline and answers DEADLINE_EXCEEDED when it passes before the headers are there.
pub async fn guard(mut request: Request, next: Next) -> Response {
    let Some(value) = request.headers().get("grpc-timeout") else { return next.run(request).await };
    let timeout = match value.to_str().ok().and_then(parse) {
        Some(timeout) => timeout,
        None => {
            return refusal(Status::invalid_argument(
                "grpc-timeout is malformed: it is at most 8 digits and one of the units H, M, S, m, u, n",
            ));
        }
    };
    // Times beyond the clock's end are no deadline.
    let Some(deadline) = Instant::now().checked_add(timeout) else { return next.run(request).await };
    request.extensions_mut().insert(Deadline(deadline));
    let answer_by = deadline.checked_sub(MARGIN).unwrap_or(deadline);
    match tokio::time::timeout_at(answer_by.into(), next.run(request)).await {
        Ok(response) => response,
        Err(_) => refusal(Status::deadline_exceeded("the deadline passed before the request could start")),
    }
}

/// The form of the gRPC specification: `TimeoutValue TimeoutUnit`, at most 8 digits.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_read_and_everything_else_is_malformed() {
        let good = [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("4m", Duration::from_millis(4)),
            ("5u", Duration::from_micros(5)),
            ("99999999n", Duration::from_nanos(99_999_999)),
        ];
        for (text, duration) in good {
            assert_eq!(parse(text), Some(duration), "{text}");
        }
        for text in ["", "S", "1", "1s", "-1S", "+1S", "1.5S", "123456789S", " 1S", "1SS", "1é", "é"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
