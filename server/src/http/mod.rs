//! The HTTP front: OpenAI, Anthropic and model-server styles over one [`EngineClient`](crate::client::EngineClient).
//!
//! `routes` is the table of everything there is; `door` is what every request passes; `server` is the port. The modules named after
//! families translate JSON to the engine's terms and answers back; `answer` is what they share of an answer.

pub mod answer;
mod anthropic;
pub mod app;
mod call;
mod door;
mod engine_routes;
mod error;
mod fields;
mod gather;
mod live;
mod metrics;
mod openai;
mod openapi;
mod ops;
mod page;
mod predict;
pub mod routes;
mod server;
mod sse;

pub use app::AppState;
use call::{App, Call, json_response};
pub use error::{ApiError, Family};
pub use server::HttpServer;
