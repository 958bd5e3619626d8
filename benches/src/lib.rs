//! The load generator: streams over gRPC, timed at the client, where users feel it.

pub mod load;
pub mod server;
pub mod summary;
