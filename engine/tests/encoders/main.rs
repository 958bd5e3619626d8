//! Encoders, embedders and rerankers against Hugging Face transformers in float32, from what `scripts/golden_encoders.py` computed: through the
//! whole engine, alone and in company. Every field of a configuration that matters must be noticed.

#![allow(clippy::unwrap_used)]

mod company;
mod goldens;
mod heads;
mod mutations;
mod rig;
