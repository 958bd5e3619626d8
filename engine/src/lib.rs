//! The Tidemill engine: requests in, tokens out; no network. `engine/ARCHITECTURE.md` is the map.

pub mod activity;
pub mod adapter;
mod adapters;
mod admission;
mod config;
pub mod constraint;
mod core;
mod device;
mod embedding;
mod ended;
mod engine;
pub mod error;
mod event;
pub mod explain;
mod generation;
mod handle;
mod heads;
pub mod ids;
mod info;
pub mod inspect;
pub mod kv;
mod ledger;
mod life;
pub mod model;
pub mod output;
#[cfg(not(feature = "planted"))]
mod planted;
#[cfg(feature = "planted")]
pub mod planted;
mod pooling;
mod queue;
pub mod request;
pub mod runner;
pub mod sampling;
pub mod scheduler;
mod sizes;
mod stats;
mod stopped;
pub mod structured;
mod swap;
mod sync;
pub mod text;
mod unread;

pub use adapters::{AdapterInfo, Adapters, LoraConfig};
pub use config::{ComputeDtype, DeviceChoice, EngineConfig, Quantization, SchedulingConfig};
pub use embedding::{PendingEmbedding, PendingScore};
pub use engine::{Engine, EngineOptions, Progress};
pub use error::{ErrorCode, LoadError, RequestError, StopReason, Violation};
pub use generation::Generation;
pub use handle::{Drained, EngineHandle, KvWatch};
pub use heads::{Heads, TextRules};
pub use info::{EmbeddingInfo, ModelInfo, PairFormat, ScoringInfo};
pub use pooling::{Head, HeadFunction, HeadLayer, Linear, Pooling, Scorer};
pub use stats::{Counters, EngineStats, Histogram, Histograms};
pub use tidemill_kernels::DType;
