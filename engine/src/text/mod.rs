//! Text in, ids out, and back.
