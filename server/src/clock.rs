//! The time of day, for those who are told it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Since 1970; nothing on a machine whose clock stands before that.
pub fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
