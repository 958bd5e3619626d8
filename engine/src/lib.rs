//! The Tidemill engine: requests in, tokens out; no network. `engine/ARCHITECTURE.md` is the map.

pub mod error;
pub mod ids;
pub mod model;
pub mod text;
