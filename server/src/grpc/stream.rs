//! A generation as a response stream. Dropping the stream, as tonic does when the client resets it or its connection dies,
//! drops the generation, which aborts the request.

use std::{collections::VecDeque, panic::AssertUnwindSafe, pin::Pin};

use futures_util::{FutureExt, Stream, stream};
use tidemill_engine::{Generation, RequestError};
use tonic::Status;

use super::{call::Call, panics::INTERNAL};
use crate::convert::{self, WriteOutput};

/// A stream of messages that ends with at most one status.
pub type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A generation on its way to the client.
pub struct Answer<W: WriteOutput> {
    generation: Generation,
    /// How outputs become messages.
    writer: W,
    /// Messages of the last output that have not been sent.
    ready: VecDeque<W::Message>,
    call: Call,
}

impl<W> Answer<W>
where
    W: WriteOutput + Send + 'static,
    W::Message: Send + 'static,
{
    /// An answer of which nothing has been sent.
    pub fn new(generation: Generation, writer: W, call: Call) -> Self {
        Self { generation, writer, ready: VecDeque::new(), call }
    }

    /// The messages of this generation.
    pub fn into_stream(self) -> ResponseStream<W::Message> {
        Box::pin(stream::unfold(Some(self), |state| async {
            let mut answer = state?;
            let message = answer.next().await?;
            // A status is the last thing a stream gives.
            let state = message.is_ok().then_some(answer);
            Some((message, state))
        }))
    }

    async fn next(&mut self) -> Option<Result<W::Message, Status>> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Some(Ok(message));
            }
            let next = AssertUnwindSafe(self.generation.next()).catch_unwind().await;
            match next {
                Ok(Some(Ok(output))) => {
                    self.call.note(&output);
                    self.writer.write(output, &mut self.ready);
                }
                Ok(Some(Err(error))) => return Some(Err(self.fail(&error))),
                Ok(None) => {
                    self.call.succeed();
                    return None;
                }
                // A panic of the detokeniser, say: this request alone ends.
                Err(_) => return Some(Err(self.fail(&RequestError::Internal(INTERNAL.into())))),
            }
        }
    }

    fn fail(&mut self, error: &RequestError) -> Status {
        let status = convert::status(error, self.call.id());
        self.call.fail(status)
    }
}
