//! Readings of the engine at an interval, as response streams.

use std::{sync::Arc, time::Duration};

use futures_util::stream;
use tidemill_engine::{EngineHandle, RequestError};
use tidemill_proto::v1;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tonic::Status;

use super::{call::Call, lifecycle::Lifecycle, stream::ResponseStream};
use crate::convert;

/// Time between two readings: what the client asks for, or the default, within bounds of which the upper is a minute.
pub fn interval_of(asked: Option<u32>, default: u32, least: u32) -> Result<Duration, RequestError> {
    const MOST: u32 = 60_000;
    let every = asked.unwrap_or(default);
    match (least..=MOST).contains(&every) {
        true => Ok(Duration::from_millis(every.into())),
        false => Err(RequestError::invalid("interval_ms", format!("{every} is not in [{least}, {MOST}]"))),
    }
}

/// Whoever reads the engine at an interval, until the client goes or the server stops.
pub struct Readings {
    /// What is read.
    pub engine: EngineHandle,
    /// Time between two readings.
    pub every: Duration,
    /// Ends the stream with the server.
    pub lifecycle: Arc<Lifecycle>,
    /// The log line.
    pub call: Call,
}

impl Readings {
    /// Gauges, counters and distributions.
    pub fn stats(self) -> ResponseStream<v1::WatchStatsResponse> {
        let ticks = self.ticks();
        Box::pin(stream::unfold((self, ticks), |(mut readings, mut ticks)| async {
            readings.next(&mut ticks).await?;
            let stats = Some(convert::stats(&readings.engine.stats()));
            Some((Ok(v1::WatchStatsResponse { stats }), (readings, ticks)))
        }))
    }

    /// The engine at work.
    pub fn activity(self) -> ResponseStream<v1::WatchActivityResponse> {
        let ticks = self.ticks();
        Box::pin(stream::unfold(Some((self, ticks)), |state| async {
            let (mut readings, mut ticks) = state?;
            readings.next(&mut ticks).await?;
            match readings.engine.activity().await {
                Ok(activity) => {
                    let activity = Some(convert::activity(&activity));
                    Some((Ok(v1::WatchActivityResponse { activity }), Some((readings, ticks))))
                }
                // A status is the last thing a stream gives.
                Err(error) => Some((Err(readings.fail(&error)), None)),
            }
        }))
    }

    fn ticks(&self) -> Interval {
        let mut ticks = interval(self.every);
        // A reader that was slow gets the present, not the past.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        ticks
    }

    /// Waits for the time of the next reading; `None` when there is none.
    async fn next(&mut self, ticks: &mut Interval) -> Option<()> {
        tokio::select! {
            biased;
            () = self.lifecycle.stopped() => {
                self.call.succeed();
                None
            }
            _ = ticks.tick() => Some(()),
        }
    }

    fn fail(&mut self, error: &RequestError) -> Status {
        let status = convert::status(error, self.call.id());
        self.call.fail(status)
    }
}
