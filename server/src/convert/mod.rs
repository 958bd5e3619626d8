//! The only translator between the engine's types and the wire's.

mod activity;
mod control;
mod embed;
mod error;
mod explain;
mod kv_events;
mod model;
pub mod remote;
mod request;
mod response;
mod score;
pub mod vllm;

pub use activity::activity;
pub use control::{abort_all_response, abort_response, drain_response, stats};
pub use embed::{embed_request, embed_response};
pub use error::{code, code_name, status};
pub use explain::{explain_response, finish_reason, finish_reason_name};
pub use kv_events::kv_event_messages;
pub use model::{adapter_messages, model_response};
pub use request::{chat_prompt, generate_request, token_ids};
pub use response::{ResponseWriter, WriteOutput};
pub use score::{score_request, score_response};
