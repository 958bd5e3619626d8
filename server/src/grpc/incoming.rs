//! New connections, accepted on a task of their own.
//!
//! Two things that tonic's own accept loop does not do: when the process is out of file descriptors, every accept fails at once, and
//! ours waits instead of spinning; and a connection on which nothing is ever said does not hold its descriptor for long.

use std::{io, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time,
};
use tokio_stream::wrappers::ReceiverStream;

/// Accepted connections that wait to be served.
const BACKLOG: usize = 64;
/// Rest after a failed accept.
const REST: Duration = Duration::from_millis(50);
/// HTTP/2 and TLS clients speak first, and at once.
const FIRST_BYTE: Duration = Duration::from_secs(10);

/// Connections to a listener, until the stream is dropped; the port is closed then.
pub fn connections(listener: TcpListener) -> ReceiverStream<io::Result<TcpStream>> {
    let (accepted, connections) = mpsc::channel(BACKLOG);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                biased;
                () = accepted.closed() => return,
                connection = listener.accept() => match connection {
                    Ok((connection, _)) => drop(tokio::spawn(greet(connection, accepted.clone()))),
                    Err(error) => {
                        tracing::warn!(%error, "a connection cannot be accepted");
                        time::sleep(REST).await;
                    }
                },
            }
        }
    });
    ReceiverStream::new(connections)
}

/// Hands a connection on when its client has spoken.
async fn greet(connection: TcpStream, accepted: mpsc::Sender<io::Result<TcpStream>>) {
    // A refusal costs latency only.
    drop(connection.set_nodelay(true));
    if time::timeout(FIRST_BYTE, connection.readable()).await.is_ok() {
        // Fails when the server has stopped, and the connection ends.
        drop(accepted.send(Ok(connection)).await);
    }
}
