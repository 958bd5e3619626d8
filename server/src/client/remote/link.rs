//! What is known of the engine at the moment.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::{
    client::{CallError, ModelCard},
    grpc::Phase,
};

/// Written by the watch, read by every request.
#[derive(Debug, Default)]
pub struct Link(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    serving: bool,
    /// Absent while the engine cannot be reached or loads.
    card: Option<Arc<ModelCard>>,
}

impl Link {
    /// The engine serves this model.
    pub fn serves(&self, card: Arc<ModelCard>) {
        *self.0.lock() = State { serving: true, card: Some(card) };
    }

    /// It is there and takes no requests: it loads, or it drains.
    pub fn rests(&self) {
        self.0.lock().serving = false;
    }

    /// It cannot be reached.
    pub fn lost(&self) {
        *self.0.lock() = State::default();
    }

    /// The stage of the engine's life, as far as it can be seen from here.
    pub fn phase(&self) -> Phase {
        match &*self.0.lock() {
            State { card: None, .. } => Phase::Loading,
            State { serving: true, .. } => Phase::Ready,
            State { serving: false, .. } => Phase::Draining,
        }
    }

    /// What is loaded.
    ///
    /// # Errors
    /// UNAVAILABLE while the engine cannot be reached or loads.
    pub fn card(&self) -> Result<Arc<ModelCard>, CallError> {
        self.0.lock().card.clone().ok_or_else(CallError::unreachable)
    }
}
