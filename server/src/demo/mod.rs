//! The demonstration.

use crate::exit::Failure;

/// Shows what Tidemill does.
///
/// # Errors
/// When anything is not as it should be.
pub async fn demo(_color: bool) -> Result<(), Failure> {
    Ok(())
}
