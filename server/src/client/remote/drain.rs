//! A gateway that goes down: no new requests, time for those that run, then an end for the rest.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// How many requests run, and whether more may come.
#[derive(Debug, Clone)]
pub struct Drain {
    running: Arc<watch::Sender<Running>>,
    cut: CancellationToken,
}

#[derive(Debug, Clone, Copy, Default)]
struct Running {
    requests: usize,
    /// No more may come.
    closed: bool,
}

impl Default for Drain {
    fn default() -> Self {
        Self { running: Arc::new(watch::Sender::new(Running::default())), cut: CancellationToken::new() }
    }
}

impl Drain {
    /// A place for a new request, unless none may come.
    pub fn enter(&self) -> Option<Place> {
        let entered = self.running.send_if_modified(|running| {
            running.requests += usize::from(!running.closed);
            !running.closed
        });
        entered.then(|| Place(self.clone()))
    }

    /// No more requests from now on.
    pub fn begin(&self) {
        self.running.send_modify(|running| running.closed = true);
    }

    /// Whether none may come.
    pub fn is_under_way(&self) -> bool {
        self.running.borrow().closed
    }

    /// Waits until all have ended, and after `grace` ends those that are left. The number of these.
    pub async fn end(&self, grace: Duration) -> usize {
        let mut running = self.running.subscribe();
        let ended = time::timeout(grace, running.wait_for(|running| running.requests == 0)).await.is_ok();
        let left = if ended { 0 } else { self.running.borrow().requests };
        self.cut.cancel();
        left
    }
}

/// A running request's place, until it is dropped.
#[derive(Debug)]
pub struct Place(Drain);

impl Place {
    /// Resolves when the request must end at once.
    pub fn cut(&self) -> WaitForCancellationFutureOwned {
        self.0.cut.clone().cancelled_owned()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.running.send_modify(|running| running.requests -= 1);
    }
}
