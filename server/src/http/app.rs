//! What all handlers share.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use tidemill_engine::{RequestError, ids::RequestId};

use super::openai::responses::Store;
use crate::{
    auth::ApiKeys,
    client::{CallError, EngineClient, ModelCard},
    config::HttpConfig,
};

/// The state of the HTTP front.
#[derive(Debug)]
pub struct AppState {
    /// The engine, here or elsewhere.
    pub engine: Arc<dyn EngineClient>,
    /// Keys that clients must present; none lets everyone in.
    pub keys: ApiKeys,
    /// Largest body in bytes.
    pub max_body_bytes: usize,
    /// Whether there is a page at `/`.
    pub live_page: bool,
    /// Requests of HTTP that are several of the engine.
    pub groups: Groups,
    /// Responses that clients can come back to.
    pub responses: Store,
}

/// Requests of HTTP that are several of the engine: an abort of one name must end all of them.
#[derive(Debug, Clone, Default)]
pub struct Groups(Arc<Mutex<HashMap<RequestId, usize>>>);

impl Groups {
    /// Notes a request of `members` prompts until the group is dropped. A request of one prompt has the engine's own name.
    pub fn enter(&self, id: &RequestId, members: usize) -> Group {
        let mut groups = self.0.lock();
        // A second request of the same name is about to be refused, and the first one must stay.
        let entered = members > 1 && !groups.contains_key(id);
        if entered {
            groups.insert(id.clone(), members);
        }
        Group(entered.then(|| (self.clone(), id.clone())))
    }

    /// The engine's names of a request.
    pub fn members(&self, id: &RequestId) -> Vec<RequestId> {
        match self.0.lock().get(id) {
            Some(&members) => (0..members).map(|at| RequestId::new(format!("{id}-{at}"))).collect(),
            None => vec![id.clone()],
        }
    }
}

/// A request under way that is several of the engine.
#[derive(Debug)]
pub struct Group(Option<(Groups, RequestId)>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some((groups, id)) = &self.0 {
            groups.0.lock().remove(id);
        }
    }
}

impl AppState {
    /// The state of a server over this engine.
    pub fn new(config: &HttpConfig, engine: Arc<dyn EngineClient>) -> Self {
        Self {
            engine,
            keys: config.keys.clone(),
            max_body_bytes: config.max_body_bytes,
            live_page: config.live_page,
            groups: Groups::default(),
            responses: Store::default(),
        }
    }

    /// What is loaded.
    ///
    /// # Errors
    /// UNAVAILABLE while nothing is.
    pub fn model(&self) -> Result<Arc<ModelCard>, CallError> {
        self.engine.model()
    }

    /// The same, if it or one of its adapters has the name that a client asked for; under that name.
    ///
    /// # Errors
    /// As [`Self::model`]; NOT_FOUND for another name.
    pub async fn model_named(&self, asked: Option<&str>) -> Result<Arc<ModelCard>, CallError> {
        let card = self.model()?;
        let Some(asked) = asked.filter(|asked| !asked.is_empty() && **asked != card.served_model_name) else {
            return Ok(card);
        };
        if self.engine.adapters().await?.iter().any(|adapter| adapter.name == asked) {
            return Ok(Arc::new(ModelCard { served_model_name: asked.to_owned(), ..(*card).clone() }));
        }
        let served = card.served_model_name.clone();
        Err(RequestError::ModelNotFound { asked: asked.to_owned(), served }.into())
    }
}
