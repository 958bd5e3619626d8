//! A model as it lies on disk: its files, its specification and its weights.

mod fields;

pub mod checkpoint;
pub mod files;
pub mod generation_config;
pub mod rope;
pub mod spec;

pub use checkpoint::Checkpoint;
pub use files::{ModelFiles, ModelSource};
pub use generation_config::GenerationDefaults;
pub use rope::{RopeScaling, RopeSpec, rope_table};
pub use spec::{Architecture, ModelSpec, TensorSpec};
