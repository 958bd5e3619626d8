//! Encoding and decoding on threads of their own: they may take long, and the network must stay responsive.

use std::{sync::Arc, thread};

use tidemill_engine::RequestError;
use tokio::{sync::Semaphore, task};

/// Bounds how much text work happens at once: more than the machine's cores would only take time from the engine.
#[derive(Debug, Clone)]
pub struct TextWorkers(Arc<Semaphore>);

impl Default for TextWorkers {
    /// One place per core.
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, Into::into);
        Self(Arc::new(Semaphore::new(cores)))
    }
}

impl TextWorkers {
    /// Runs `work` as soon as there is a place. A panic ends this piece of work alone.
    ///
    /// # Errors
    /// What `work` returned, or [`RequestError::Internal`] after a panic.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, RequestError> + Send + 'static,
    ) -> Result<T, RequestError> {
        let failed =
            |error: &dyn std::fmt::Display| RequestError::Internal(format!("text work failed: {error}"));
        // The place belongs to the work and not to the caller: it is taken until the work is done, even when the caller
        // gives up.
        let place = self.0.clone().acquire_owned().await.map_err(|error| failed(&error))?;
        let done = task::spawn_blocking(move || {
            let result = work();
            drop(place);
            result
        });
        done.await.map_err(|error| failed(&error))?
    }
}
