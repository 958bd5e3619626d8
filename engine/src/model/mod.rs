//! Models: files, specification, decoder.
pub mod decoder;
