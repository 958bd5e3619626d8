//! Models: files, specification, decoder.
