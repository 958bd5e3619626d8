//! Clients that ask again as soon as they are answered.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tonic::Status;

use super::{
    Bench, Served,
    client::{Ask, Seen, follow},
};
use crate::load;

/// What each client of a crowd asks for, with another prompt each time.
#[derive(Debug, Clone)]
pub struct Kind {
    /// Clients.
    pub size: usize,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens of each answer.
    pub max_tokens: u32,
    /// See `GenerateRequest.priority`.
    pub priority: i32,
    /// See `GenerateRequest.tenant`.
    pub tenant: &'static str,
}

/// What a crowd saw.
#[derive(Debug, Default)]
pub struct Log {
    /// Tokens received.
    pub tokens: usize,
    /// Between two messages of a stream.
    pub gaps: Vec<Duration>,
    /// Of each request that has its first token.
    pub ttfts: Vec<Duration>,
    /// Answers that are complete.
    pub answers: Vec<Seen>,
    error: Option<Status>,
}

/// Clients at work; they stop when this is dropped.
#[derive(Debug)]
pub struct Crowd {
    _tasks: JoinSet<()>,
    log: Arc<Mutex<Log>>,
}

impl Crowd {
    /// Starts the clients, and waits until each of `until` requests has its first token.
    ///
    /// # Errors
    /// As [`Crowd::take`].
    pub async fn start(bench: &Bench, served: &Served, kind: Kind, until: usize) -> Result<Self, Status> {
        let (log, mut tasks) = (Arc::new(Mutex::new(Log::default())), JoinSet::new());
        let number = Arc::new(AtomicU64::new(bench.next_number()));
        for _ in 0..kind.size {
            let (client, kind) = (served.client.clone(), kind.clone());
            let (log, number, vocab) = (log.clone(), number.clone(), served.model.vocab_size);
            tasks.spawn(async move {
                loop {
                    let prompt =
                        load::prompt(number.fetch_add(1, Ordering::Relaxed), kind.prompt_tokens, vocab);
                    let (max_tokens, priority) = (kind.max_tokens, kind.priority);
                    let ask = Ask { prompt, max_tokens, priority, tenant: kind.tenant.into() };
                    let note = |tokens: super::client::Tokens| {
                        let mut log = lock(&log);
                        log.tokens += tokens.count;
                        let times = if tokens.is_first { &mut log.ttfts } else { &mut log.gaps };
                        times.push(tokens.gap);
                    };
                    match follow(&client, ask, Instant::now(), note).await {
                        Ok(seen) => lock(&log).answers.push(seen),
                        Err(status) => {
                            lock(&log).error.get_or_insert(status);
                            return;
                        }
                    }
                }
            });
        }
        let crowd = Self { _tasks: tasks, log };
        while lock(&crowd.log).ttfts.len() < until && lock(&crowd.log).error.is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(crowd)
    }

    /// What was seen since the last call.
    ///
    /// # Errors
    /// The first status that any request ended with.
    pub fn take(&self) -> Result<Log, Status> {
        let log = std::mem::take(&mut *lock(&self.log));
        log.error.map_or(Ok(()), Err).map(|()| Log { error: None, ..log })
    }
}

fn lock(log: &Mutex<Log>) -> std::sync::MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}
