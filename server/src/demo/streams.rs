//! The client's side of the demonstration: streams over TCP, timed where a user would feel it.

use std::time::{Duration, Instant};

use tidemill_proto::v1::{
    AbortRequest, AbortResponse, FinishReason, GenerateRequest, GetStatsRequest, Stats,
    control_client::ControlClient, inference_client::InferenceClient,
};
use tokio::sync::mpsc::UnboundedSender;
use tonic::{Status, transport::Channel};

/// Something for the screen.
#[derive(Debug)]
pub enum Event {
    /// New text of a stream, and its tokens so far.
    Text { index: usize, text: String, tokens: usize },
    /// A stream's end.
    Done { index: usize, outcome: Result<Timing, Status> },
    /// The abort's.
    Aborted(Box<Result<Abort, Status>>),
}

/// What a stream gave, and when.
#[derive(Debug)]
pub struct Timing {
    /// From sending the request to its first token.
    pub first_token: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// Tokens received.
    pub tokens: usize,
    /// How it ended.
    pub finish: FinishReason,
}

impl Timing {
    /// Mean time between tokens.
    pub fn inter_token(&self) -> Duration {
        self.decode / self.tokens.saturating_sub(1).max(1) as u32
    }

    /// Tokens per second after the first.
    pub fn rate(&self) -> f64 {
        self.tokens.saturating_sub(1) as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

/// Follows one stream to its end and tells what comes.
pub async fn follow(
    client: InferenceClient<Channel>,
    index: usize,
    request: GenerateRequest,
    events: UnboundedSender<Event>,
) {
    let outcome = timed(client, index, request, &events).await;
    // The screen is there until all streams are done.
    drop(events.send(Event::Done { index, outcome }));
}

async fn timed(
    mut client: InferenceClient<Channel>,
    index: usize,
    request: GenerateRequest,
    events: &UnboundedSender<Event>,
) -> Result<Timing, Status> {
    let sent = Instant::now();
    let mut messages = client.generate(request).await?.into_inner();
    let (mut first, mut last, mut tokens) = (None, sent, 0);
    let mut finish = FinishReason::Unspecified;
    while let Some(message) = messages.message().await? {
        if !message.token_ids.is_empty() {
            last = Instant::now();
            first.get_or_insert(last);
            tokens += message.token_ids.len();
        }
        finish = message.finish_reason();
        drop(events.send(Event::Text { index, text: message.text, tokens }));
    }
    let first = first.unwrap_or(last);
    Ok(Timing { first_token: first - sent, decode: last - first, tokens, finish })
}

/// An abort, with the engine's statistics around it.
#[derive(Debug)]
pub struct Abort {
    /// Before.
    pub before: Stats,
    /// What the engine says it freed.
    pub receipt: AbortResponse,
    /// After.
    pub after: Stats,
}

/// Aborts a request and tells what came of it.
pub async fn abort(mut control: ControlClient<Channel>, request_id: String, events: UnboundedSender<Event>) {
    let abort = async {
        let before = stats(&mut control).await?;
        let receipt = control.abort(AbortRequest { request_id }).await?.into_inner();
        let after = stats(&mut control).await?;
        Ok(Abort { before, receipt, after })
    };
    drop(events.send(Event::Aborted(Box::new(abort.await))));
}

/// The engine's statistics now.
///
/// # Errors
/// The server's status.
pub async fn stats(control: &mut ControlClient<Channel>) -> Result<Stats, Status> {
    let response = control.get_stats(GetStatsRequest {}).await?.into_inner();
    response.stats.ok_or_else(|| Status::internal("no statistics"))
}
