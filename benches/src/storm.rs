//! A storm of aborts through the wire, and the streams that live through it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tidemill_proto::v1::{
    AbortRequest, AbortResponse, AbortStage, FinishReason, GenerateRequest, OutputOptions, SamplingParams,
    TokenIds, control_client::ControlClient, generate_request::Prompt, inference_client::InferenceClient,
};
use tokio::task::JoinSet;
use tonic::{Status, transport::Channel};

/// Aborts under way at once, at most: a server that falls behind shall not be buried by its client.
const MAX_IN_FLIGHT: usize = 512;
/// Between two looks at how many aborts are due.
const TICK: Duration = Duration::from_millis(1);

/// Aborts at a steady rate. Every second one is of a live request, which is started for it; of the others one half names a
/// request that has ended, one half a request that never was.
#[derive(Debug, Clone)]
pub struct Storm {
    /// Distinguishes this storm's requests from another's.
    pub name: String,
    /// Aborts per second to send.
    pub rate: u32,
    /// How long.
    pub duration: Duration,
}

/// What the receipts of a storm say.
#[derive(Debug, Clone, Default)]
pub struct Receipts {
    /// Of each live request: from the engine's receipt of the abort until everything was free.
    pub to_free: Vec<Duration>,
    /// Of each abort: from sending it to its receipt.
    pub round_trips: Vec<Duration>,
    /// From the first abort to the last receipt.
    pub wall: Duration,
}

impl Receipts {
    /// Aborts per second that were answered.
    pub fn rate(&self) -> f64 {
        self.round_trips.len() as f64 / self.wall.as_secs_f64()
    }
}

/// Whom an abort is meant for.
enum Target {
    /// A request that is started first.
    Live(String),
    /// A request that ended a moment ago.
    Ended(String),
    /// Nobody.
    Unknown(String),
}

/// One abort that was answered.
struct Answered {
    /// The request, if it was live.
    live: Option<String>,
    receipt: AbortResponse,
    round_trip: Duration,
}

impl Storm {
    /// Sends the storm over one connection and waits for every receipt and for the end of every stream.
    ///
    /// # Errors
    /// Any status; or DATA_LOSS when a receipt names another stage than the one its request can be in, or when an aborted
    /// stream does not end as aborted.
    pub async fn run(&self, channel: Channel) -> Result<Receipts, Status> {
        let start = Instant::now();
        let (mut tasks, mut sent, mut receipts) = (JoinSet::new(), 0_u64, Receipts::default());
        let mut ended = None;
        let mut ticks = tokio::time::interval(TICK);
        while start.elapsed() < self.duration {
            let due = (start.elapsed().as_secs_f64() * f64::from(self.rate)) as u64;
            while sent < due && tasks.len() < MAX_IN_FLIGHT {
                tasks.spawn(abort(channel.clone(), self.target(sent, ended.as_ref())));
                sent += 1;
            }
            // Both, in turn: the receipts that have come, and the next tick.
            tokio::select! {
                Some(answered) = tasks.join_next() => receipts.note(answered, &mut ended)?,
                _ = ticks.tick() => {}
            }
            while let Some(answered) = tasks.try_join_next() {
                receipts.note(answered, &mut ended)?;
            }
        }
        while let Some(answered) = tasks.join_next().await {
            receipts.note(answered, &mut ended)?;
        }
        receipts.wall = start.elapsed();
        Ok(receipts)
    }

    fn target(&self, number: u64, ended: Option<&String>) -> Target {
        let id = format!("{}-{number}", self.name);
        match (number % 4, ended) {
            (0 | 2, _) => Target::Live(id),
            (1, Some(ended)) => Target::Ended(ended.clone()),
            _ => Target::Unknown(id),
        }
    }
}

impl Receipts {
    fn note(
        &mut self,
        answered: Result<Result<Answered, Status>, tokio::task::JoinError>,
        ended: &mut Option<String>,
    ) -> Result<(), Status> {
        let answered = answered.map_err(|error| Status::internal(error.to_string()))??;
        self.round_trips.push(answered.round_trip);
        if let Some(id) = answered.live {
            self.to_free.push(Duration::from_secs_f64(answered.receipt.seconds_to_free));
            *ended = Some(id);
        }
        Ok(())
    }
}

async fn abort(channel: Channel, target: Target) -> Result<Answered, Status> {
    let mut control = ControlClient::new(channel.clone());
    let (id, messages) = match &target {
        Target::Live(id) => {
            let request = request(id.clone(), vec![3], 1000);
            // Its headers say that it has been submitted: the abort cannot overtake it.
            (id.clone(), Some(InferenceClient::new(channel).generate(request).await?.into_inner()))
        }
        Target::Ended(id) | Target::Unknown(id) => (id.clone(), None),
    };
    let sent = Instant::now();
    let receipt = control.abort(AbortRequest { request_id: id.clone() }).await?.into_inner();
    let round_trip = sent.elapsed();
    let expected = match target {
        Target::Live(_) => {
            matches!(receipt.stage(), AbortStage::Queued | AbortStage::Prefill | AbortStage::Decode)
        }
        Target::Ended(_) => receipt.stage() == AbortStage::Finished,
        Target::Unknown(_) => receipt.stage() == AbortStage::Unspecified,
    };
    if !expected {
        return Err(Status::data_loss(format!("the receipt of an abort in a storm says {receipt:?}")));
    }
    let live = messages.is_some().then_some(id);
    if let Some(mut messages) = messages {
        let mut last = FinishReason::Unspecified;
        while let Some(message) = messages.message().await? {
            last = message.finish_reason();
        }
        if last != FinishReason::Abort {
            return Err(Status::data_loss(format!("an aborted stream ended as {last:?}")));
        }
    }
    Ok(Answered { live, receipt, round_trip })
}

/// A stream that should not notice the storm.
#[derive(Debug, Clone)]
pub struct Survivor {
    channel: Channel,
    prompt: Vec<u32>,
    max_tokens: u32,
    /// What it generates alone.
    alone: Arc<Vec<u32>>,
}

impl Survivor {
    /// Lets the stream run once, alone: those are its tokens from now on.
    ///
    /// # Errors
    /// Any status.
    pub async fn new(channel: Channel, prompt: Vec<u32>, max_tokens: u32) -> Result<Self, Status> {
        let mut survivor = Self { channel, prompt, max_tokens, alone: Arc::default() };
        let (mut tokens, mut gaps) = (Vec::new(), Vec::new());
        survivor.stream(None, &mut tokens, &mut gaps).await?;
        survivor.alone = Arc::new(tokens);
        Ok(survivor)
    }

    /// Streams again and again until `end`; returns the times between one message and the next.
    ///
    /// # Errors
    /// Any status; DATA_LOSS when its tokens are not those that it generates alone.
    pub async fn live_until(&self, end: Instant) -> Result<Vec<Duration>, Status> {
        let mut gaps = Vec::new();
        while Instant::now() < end {
            let mut tokens = Vec::new();
            self.stream(Some(end), &mut tokens, &mut gaps).await?;
            if !self.alone.starts_with(&tokens) {
                return Err(Status::data_loss("a survivor's tokens are not those that it generates alone"));
            }
        }
        Ok(gaps)
    }

    /// One stream, given up at `end`.
    async fn stream(
        &self,
        end: Option<Instant>,
        tokens: &mut Vec<u32>,
        gaps: &mut Vec<Duration>,
    ) -> Result<(), Status> {
        let request = request(String::new(), self.prompt.clone(), self.max_tokens);
        let mut messages = InferenceClient::new(self.channel.clone()).generate(request).await?.into_inner();
        let mut last = None;
        while let Some(message) = messages.message().await? {
            let now = Instant::now();
            if end.is_some_and(|end| now >= end) {
                return Ok(());
            }
            gaps.extend(last.map(|last| now - last));
            last = Some(now);
            tokens.extend(message.token_ids);
        }
        match tokens.len() == self.max_tokens as usize {
            true => Ok(()),
            false => Err(Status::data_loss(format!("a survivor ended after {} tokens", tokens.len()))),
        }
    }
}

/// A greedy request that goes on past the end of sequence.
fn request(request_id: String, prompt: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id,
        prompt: Some(Prompt::TokenIds(TokenIds { ids: prompt })),
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        output: Some(OutputOptions { token_ids_only: true, include_special_tokens: false }),
        ..GenerateRequest::default()
    }
}
