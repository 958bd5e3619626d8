//! The Tidemill engine.
