//! The only translator between the engine's types and the wire's.

mod control;
mod error;
mod model;
mod request;
mod response;

pub use control::{abort_response, drain_response, stats};
pub use error::status;
pub use model::model_response;
pub use request::{chat_prompt, generate_request, token_ids};
pub use response::ResponseWriter;
