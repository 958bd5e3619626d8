//! A fence around foreign code that may panic on hostile input.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `f`; a panic inside becomes `Err` with its message.
pub(super) fn caught<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    // What `f` touches is either owned by it or only read, so a panic leaves nothing half-changed behind.
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic").to_owned()
    })
}
