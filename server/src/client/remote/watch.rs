//! Looks for the engine, in the background, for as long as the gateway lives.

use std::{sync::Arc, time::Duration};

use tidemill_proto::v1::{self, inference_client::InferenceClient, inference_server::SERVICE_NAME};
use tokio::time;
use tonic::Status;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{channel::Channel, link::Link};
use crate::{client::ModelCard, convert::remote as convert};

/// Rest before the first new try; it doubles from try to try.
const FIRST_REST: Duration = Duration::from_millis(50);
/// Longest rest: an engine that comes back is found within this.
const LONGEST_REST: Duration = Duration::from_millis(800);
/// What the engine may take to say what it has loaded.
const MODEL_TIMEOUT: Duration = Duration::from_secs(30);

/// The watch over one engine.
pub struct Watch {
    health: HealthClient<Channel>,
    inference: InferenceClient<Channel>,
    link: Arc<Link>,
    /// What was last wrong: it is said once.
    complaint: String,
    found: bool,
}

impl Watch {
    /// A watch that tells `link` what it sees.
    pub fn new(channel: Channel, inference: InferenceClient<Channel>, link: Arc<Link>) -> Self {
        Self { health: HealthClient::new(channel), inference, link, complaint: String::new(), found: false }
    }

    /// Watches without end.
    pub async fn run(mut self) {
        let mut rest = FIRST_REST;
        loop {
            self.found = false;
            let status = match self.session().await {
                Ok(()) => Status::unavailable("the engine ended the connection"),
                Err(status) => status,
            };
            self.link.lost();
            self.complain(&status);
            rest = if self.found { FIRST_REST } else { (rest * 2).min(LONGEST_REST) };
            time::sleep(rest).await;
        }
    }

    /// One connection: from the engine's first word to its last.
    async fn session(&mut self) -> Result<(), Status> {
        let request = HealthCheckRequest { service: SERVICE_NAME.to_owned() };
        let mut changes = self.health.watch(request).await?.into_inner();
        let mut card: Option<Arc<ModelCard>> = None;
        while let Some(change) = changes.message().await? {
            if change.status() != ServingStatus::Serving {
                self.link.rests();
                continue;
            }
            let card = match &card {
                Some(card) => card.clone(),
                None => card.insert(self.fetch().await?).clone(),
            };
            tracing::info!(model = card.served_model_name, "the engine is ready");
            self.complaint.clear();
            self.found = true;
            self.link.serves(card);
        }
        Ok(())
    }

    /// What is loaded.
    async fn fetch(&mut self) -> Result<Arc<ModelCard>, Status> {
        let fetched = time::timeout(MODEL_TIMEOUT, async {
            let model = self.inference.get_model(v1::GetModelRequest {}).await?.into_inner();
            let mut chunks = self.inference.get_vocabulary(v1::GetVocabularyRequest {}).await?.into_inner();
            let mut tokens = Vec::with_capacity(model.vocab_size as usize);
            while let Some(chunk) = chunks.message().await? {
                tokens.extend(chunk.tokens);
            }
            convert::model_card(model, tokens).map_err(|error| Status::internal(error.message))
        });
        let late = |_| Status::deadline_exceeded("the engine does not say what it has loaded");
        Ok(Arc::new(fetched.await.map_err(late)??))
    }

    fn complain(&mut self, status: &Status) {
        let complaint = format!("{:?}: {}", status.code(), status.message());
        if self.complaint != complaint {
            tracing::warn!(status = complaint, "the engine cannot be used; it is looked for until it can");
            self.complaint = complaint;
        }
    }
}
