//! The gRPC front end: `tidemill.v1`, the protocol of gateways that know vLLM, health checks and reflection on one port.

pub mod auth;
mod call;
mod control;
mod deadline;
mod door;
mod incoming;
mod inference;
mod kv_events;
mod lifecycle;
pub mod panics;
mod readings;
mod server;
mod stream;
mod texts;
mod vllm;
mod vocabulary;

pub use call::REQUEST_ID;
pub use inference::{OPENS_THINKING, PROMPT_TOKENS};
pub use lifecycle::{Lifecycle, Phase};
pub use server::Server;
pub use texts::TextWorkers;

/// A refusal as an HTTP response, for the layers in front of the services.
fn refusal(status: tonic::Status) -> axum::response::Response {
    status.into_http()
}
