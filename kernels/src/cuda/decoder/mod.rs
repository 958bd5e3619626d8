//! What [`super::CudaOps`] does in each of its ops, by what they work on.

pub(super) mod attention;
pub(super) mod cache;
pub(super) mod config;
pub(super) mod experts;
pub(super) mod lora;
pub(super) mod products;
pub(super) mod rows;
pub(super) mod step;
