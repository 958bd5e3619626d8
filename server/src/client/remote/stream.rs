//! One answer on its way from the engine. Dropping it resets the gRPC stream, which aborts the request.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use futures_util::{FutureExt, Stream, StreamExt};
use tidemill_engine::{RequestError, output::Output};
use tidemill_proto::v1;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Streaming;

use super::{drain::Place, failure};
use crate::{client::CallError, convert::remote as convert};

/// The outputs of one request.
pub struct Answer {
    messages: Streaming<v1::GenerateResponse>,
    completions: u32,
    /// Completions that have not ended.
    open: u32,
    deadline: Option<Instant>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    over: bool,
    _place: Place,
}

impl Answer {
    /// The answer to a request of so many completions.
    pub fn new(
        messages: Streaming<v1::GenerateResponse>,
        completions: u32,
        deadline: Option<Instant>,
        place: Place,
    ) -> Self {
        let cut = Box::pin(place.cut());
        Self { messages, completions, open: completions, deadline, cut, over: false, _place: place }
    }

    fn read(&mut self, message: v1::GenerateResponse) -> Result<Output, CallError> {
        let output = convert::output(message, self.completions)?;
        self.open = self.open.saturating_sub(u32::from(output.finish.is_some()));
        Ok(output)
    }
}

impl Stream for Answer {
    type Item = Result<Output, CallError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        let item = match self.messages.poll_next_unpin(context) {
            Poll::Pending => match self.cut.poll_unpin(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) => Some(Err(RequestError::Draining.into())),
            },
            Poll::Ready(Some(Ok(message))) => Some(self.read(message)),
            Poll::Ready(Some(Err(status))) => Some(Err(failure(&status, self.deadline))),
            Poll::Ready(None) if self.open == 0 => None,
            Poll::Ready(None) => Some(Err(CallError::internal("the engine's stream ended early"))),
        };
        self.over = !matches!(item, Some(Ok(_)));
        Poll::Ready(item)
    }
}
