//! A generation as a response stream. Dropping the stream, as tonic does when the client resets it or its connection dies,
//! drops the generation, which aborts the request.

use std::{panic::AssertUnwindSafe, pin::Pin};

use futures_util::{FutureExt, Stream, stream};
use tidemill_engine::{Generation, RequestError};
use tidemill_proto::v1;
use tonic::Status;

use super::{call::Call, panics::INTERNAL};
use crate::convert::{self, ResponseWriter};

/// A stream of messages that ends with at most one status.
pub type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A generation on its way to the client.
pub struct Answer {
    /// Where outputs come from.
    pub generation: Generation,
    /// How they become messages.
    pub writer: ResponseWriter,
    /// The log line.
    pub call: Call,
}

impl Answer {
    /// The messages of this generation.
    pub fn into_stream(self) -> ResponseStream<v1::GenerateResponse> {
        Box::pin(stream::unfold(Some(self), |state| async {
            let mut answer = state?;
            let message = answer.next().await?;
            // A status is the last thing a stream gives.
            let state = message.is_ok().then_some(answer);
            Some((message, state))
        }))
    }

    async fn next(&mut self) -> Option<Result<v1::GenerateResponse, Status>> {
        let next = AssertUnwindSafe(self.generation.next()).catch_unwind().await;
        match next {
            Ok(Some(Ok(output))) => {
                self.call.note(&output);
                Some(Ok(self.writer.message(output)))
            }
            Ok(Some(Err(error))) => Some(Err(self.fail(&error))),
            Ok(None) => {
                self.call.succeed();
                None
            }
            // A panic of the detokeniser, say: this request alone ends.
            Err(_) => Some(Err(self.fail(&RequestError::Internal(INTERNAL.into())))),
        }
    }

    fn fail(&mut self, error: &RequestError) -> Status {
        let status = convert::status(error, self.call.id());
        self.call.fail(status)
    }
}
