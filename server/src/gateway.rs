//! `tidemill gateway`: the HTTP front in a process of its own.

use crate::{
    config::{EngineAddress, HttpConfig},
    exit::Failure,
};

/// Placeholder.
pub async fn gateway(_: EngineAddress, _: HttpConfig) -> Result<(), Failure> {
    Err(Failure::usage("not yet"))
}
