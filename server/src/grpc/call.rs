//! One RPC as the log sees it: a line when it ends, however it ends.

use std::time::{Duration, Instant};

use tidemill_engine::{ids::RequestId, output::Output};
use tonic::{Code, Response, Status, metadata::MetadataMap};

use crate::convert::{code_name, finish_reason_name};

/// The header that carries a request's id, both ways of failing included.
pub const REQUEST_ID: &str = "x-request-id";

/// What scrapers, pages and gateways ask every second or so.
const POLLED: [&str; 5] = ["GetStats", "Explain", "vllm.HealthCheck", "vllm.GetLoads", "vllm.GetServerInfo"];

/// An RPC under way. Writes its log line when dropped; one that nobody ended was given up by its client.
#[derive(Debug)]
pub struct Call {
    rpc: &'static str,
    id: RequestId,
    started: Instant,
    outcome: Option<Code>,
    tokens: Tokens,
}

/// What a generation did, for the log.
#[derive(Debug, Default)]
struct Tokens {
    prompt: usize,
    completion: usize,
    first: Option<Duration>,
    finish: Vec<&'static str>,
}

impl Call {
    /// An RPC that begins.
    pub fn start(rpc: &'static str, id: RequestId) -> Self {
        Self { rpc, id, started: Instant::now(), outcome: None, tokens: Tokens::default() }
    }

    /// The request's id.
    pub fn id(&self) -> &RequestId {
        &self.id
    }

    /// The prompt's length, for the log.
    pub fn prompt_tokens(&mut self, tokens: usize) {
        self.tokens.prompt = tokens;
    }

    /// Takes notice of output that goes to the client.
    pub fn note(&mut self, output: &Output) {
        self.tokens.completion += output.token_ids.len();
        self.tokens.first.get_or_insert_with(|| self.started.elapsed());
        if let Some(finish) = &output.finish {
            self.tokens.finish.push(finish_reason_name(finish.reason));
        }
    }

    /// A response that carries the id in its headers. The call goes on.
    pub fn respond<T>(&self, message: T) -> Response<T> {
        let mut response = Response::new(message);
        self.stamp(response.metadata_mut());
        response
    }

    /// The call ended well.
    pub fn succeed(&mut self) {
        self.outcome = Some(Code::Ok);
    }

    /// The call ended with this status, which gets the id in its metadata.
    pub fn fail(&mut self, mut status: Status) -> Status {
        self.outcome = Some(status.code());
        self.stamp(status.metadata_mut());
        status
    }

    /// Ends the call with a result.
    ///
    /// # Errors
    /// The one that was given.
    pub fn end<T>(mut self, result: Result<T, Status>) -> Result<Response<T>, Status> {
        match result {
            Ok(message) => {
                self.succeed();
                Ok(self.respond(message))
            }
            Err(status) => Err(self.fail(status)),
        }
    }

    fn stamp(&self, metadata: &mut MetadataMap) {
        // An id that no header can carry is in the messages only; refused ones may be of any length.
        let short = self.id.as_str().len() <= RequestId::MAX_BYTES;
        if let Some(value) = short.then(|| self.id.as_str().parse().ok()).flatten() {
            metadata.insert(REQUEST_ID, value);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let status = code_name(self.outcome.unwrap_or(Code::Cancelled));
        let id: String = self.id.as_str().chars().take(RequestId::MAX_BYTES).collect();
        let ms = |duration: Duration| duration.as_micros() as f64 / 1e3;
        let duration_ms = ms(self.started.elapsed());
        let tokens = &self.tokens;
        let finish = tokens.finish.join(",");
        if tokens.prompt > 0 {
            // What the client saw. What the engine did is in the line of the request's life, and an operator wants one line.
            tracing::debug!(
                rpc = self.rpc,
                request_id = ?id,
                status,
                finish,
                prompt_tokens = tokens.prompt,
                completion_tokens = tokens.completion,
                first_token_ms = tokens.first.map(ms),
                duration_ms,
                "rpc"
            );
        } else if POLLED.contains(&self.rpc) && status == "OK" {
            tracing::debug!(rpc = self.rpc, request_id = ?id, status, duration_ms, "rpc");
        } else {
            tracing::info!(rpc = self.rpc, request_id = ?id, status, duration_ms, "rpc");
        }
    }
}
