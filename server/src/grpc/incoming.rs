//! New connections, accepted on a task of their own.
//!
//! When the process is out of file descriptors, every accept fails at once; tonic's own loop would spin on that. Ours waits.

use std::{io, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;

/// Accepted connections that wait to be served.
const BACKLOG: usize = 64;
/// Rest after a failed accept.
const REST: Duration = Duration::from_millis(50);

/// Connections to a listener, until the stream is dropped; the port is closed then.
pub fn connections(listener: TcpListener) -> ReceiverStream<io::Result<TcpStream>> {
    let (accepted, connections) = mpsc::channel(BACKLOG);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                biased;
                () = accepted.closed() => return,
                connection = listener.accept() => match connection {
                    Ok((connection, _)) => {
                        // A refusal costs latency only.
                        drop(connection.set_nodelay(true));
                        if accepted.send(Ok(connection)).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection cannot be accepted");
                        tokio::time::sleep(REST).await;
                    }
                },
            }
        }
    });
    ReceiverStream::new(connections)
}
