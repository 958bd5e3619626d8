//! What is there already goes out together: one frame of HTTP and one write to the socket for all of it. Nothing is waited for.
//!
//! A write costs more than everything else that is done for a token. When tokens come faster than they can be written one by one, more of
//! them are there with each write, and each costs less.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::body::Bytes;
use futures_util::Stream;

/// A frame that is not less is not added to. Readers that are slow shall find what they have not read with the engine, which sees it there,
/// and not here.
const FRAME_BYTES: usize = 8 << 10;

/// Frames of whatever parts a stream has ready.
pub struct Gathered<S, E> {
    parts: Pin<Box<S>>,
    /// The end, when it came behind parts that go out first.
    end: Option<Result<(), E>>,
}

impl<S, E> Gathered<S, E> {
    /// The frames of these parts. An error ends them.
    pub fn new(parts: S) -> Self {
        Self { parts: Box::pin(parts), end: None }
    }
}

// The parts are boxed, and errors are moved only.
impl<S, E> Unpin for Gathered<S, E> {}

impl<S, E> Stream for Gathered<S, E>
where
    S: Stream<Item = Result<Vec<u8>, E>>,
{
    type Item = Result<Bytes, E>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(end) = self.end.take() {
            return Poll::Ready(end.err().map(Err));
        }
        let mut frame = match ready!(self.parts.as_mut().poll_next(context)) {
            Some(Ok(first)) => first,
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => return Poll::Ready(None),
        };
        while frame.len() < FRAME_BYTES {
            match self.parts.as_mut().poll_next(context) {
                Poll::Ready(Some(Ok(part))) => frame.extend_from_slice(&part),
                Poll::Ready(Some(Err(error))) => {
                    self.end = Some(Err(error));
                    break;
                }
                Poll::Ready(None) => {
                    self.end = Some(Ok(()));
                    break;
                }
                Poll::Pending => break,
            }
        }
        Poll::Ready(Some(Ok(frame.into())))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt, stream};
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::UnboundedReceiverStream;

    use super::*;

    /// What a stream gives until it has nothing ready.
    fn ready_now<S: Stream + Unpin>(stream: &mut S) -> Vec<Option<S::Item>> {
        std::iter::from_fn(|| stream.next().now_or_never()).take(4).collect()
    }

    #[test]
    fn parts_that_are_ready_are_one_frame_and_none_is_waited_for() {
        let (sender, parts) = mpsc::unbounded_channel();
        let mut frames = Gathered::new(UnboundedReceiverStream::new(parts));
        let send = |part: &str| sender.send(Ok::<_, &str>(part.as_bytes().to_vec())).unwrap();
        assert_eq!(ready_now(&mut frames), []);
        send("a");
        assert_eq!(ready_now(&mut frames), [Some(Ok(Bytes::from("a")))]);
        for part in ["b", "", "c"] {
            send(part);
        }
        assert_eq!(ready_now(&mut frames), [Some(Ok(Bytes::from("bc")))]);
        send("d");
        sender.send(Err("broken")).unwrap();
        assert_eq!(ready_now(&mut frames)[..2], [Some(Ok(Bytes::from("d"))), Some(Err("broken"))]);
    }

    #[test]
    fn the_end_follows_what_came_before_it_and_frames_have_a_size() {
        let parts = (0..4).map(|_| Ok::<_, ()>(vec![b'x'; FRAME_BYTES / 2]));
        let frames: Vec<_> = Gathered::new(stream::iter(parts)).collect().now_or_never().unwrap();
        let sizes: Vec<usize> = frames.into_iter().map(|frame| frame.unwrap().len()).collect();
        assert_eq!(sizes, [FRAME_BYTES, FRAME_BYTES]);
        let none = Gathered::new(stream::iter(Vec::<Result<Vec<u8>, ()>>::new()));
        assert_eq!(none.count().now_or_never(), Some(0));
    }
}
