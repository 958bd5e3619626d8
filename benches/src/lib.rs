//! The load generator: streams over gRPC, timed at the client, where users feel it. And the speed of what lies below: single
//! kernels and whole models beside the limits of the machine.

pub mod aborts;
pub mod load;
pub mod scheduling;
pub mod server;
pub mod speed;
pub mod storm;
pub mod summary;
