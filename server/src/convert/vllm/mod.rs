//! `vllm.grpc.engine`, translated: another protocol for the same engine.

mod embed;
mod kv_events;
mod loads;
mod model;
mod request;
mod response;

pub use embed::{embed_request, embed_response};
pub use kv_events::KvEventWriter;
pub use loads::{Rates, loads_response};
pub use model::{ConfigFacts, model_info, server_info};
pub use request::generate_request;
pub use response::{CompletionWriter, Wanted};

/// A count for a signed field.
fn int32(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
