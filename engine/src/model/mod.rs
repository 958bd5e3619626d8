//! A model: its files, its specification, its weights, and the decoder that computes it.

mod families;
pub(crate) mod fields;
pub(crate) mod formats;
mod gguf;
mod parts;

pub mod checkpoint;
pub mod decoder;
pub mod files;
pub mod generation_config;
pub mod heads;
pub mod lora;
pub mod prefetch;
pub mod rope;
pub mod spec;

pub use checkpoint::Checkpoint;
pub use decoder::{Decoder, DecoderLimits};
pub use files::{ModelFiles, ModelSource};
pub use generation_config::GenerationDefaults;
pub use heads::{HeadSpec, embedding_info};
pub use rope::{RopeScaling, RopeSpec, rope_table};
pub use spec::{ModelSpec, TensorSpec};
