//! Fences around foreign code that may panic or recurse deeply on hostile input.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::Duration,
};

/// Runs `f`; a panic inside becomes `Err` with its message.
pub(super) fn caught<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    // What `f` touches is either owned by it or only read, so a panic leaves nothing half-changed behind.
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| message(&*panic))
}

/// Bytes of stack for [`on_large_stack`]; they are taken from the system only as far as they are used.
///
/// A template of the largest accepted size that does nothing but nest operators needs 64 MiB to compile in a debug build, and
/// one that spends all of its fuel on nesting lists needs as much to drop them: measured by the tests in `tests/text`.
const LARGE_STACK: usize = 192 << 20;

/// Runs `f` on a thread of its own with so large a stack that recursion which grows with its (limited) input cannot overflow
/// it: an overflow would end the process. A panic inside becomes `Err` with its message.
pub(super) fn on_large_stack<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T, String> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("chat-template".to_owned()).stack_size(LARGE_STACK);
        let thread = builder.spawn_scoped(scope, f).map_err(|error| format!("no thread: {error}"))?;
        thread.join().map_err(|panic| message(&*panic))
    })
}

/// Why there is no result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoResult {
    /// It panicked, or its thread could not be started.
    Failed(String),
    /// It was not done in time.
    TooLong,
}

/// Runs `f` on a thread of its own with a large stack, as [`on_large_stack`] does, and waits no longer than `limit`. Nobody can end a thread, so one
/// that takes longer goes on by itself: `f` holds whatever shall be held until then.
pub(super) fn within<T: Send + 'static>(
    limit: Duration,
    name: &str,
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NoResult> {
    let (sender, result) = sync_channel(1);
    let body = move || {
        // Fails only when nobody waits any more.
        let _ = sender.send(caught(f));
    };
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(LARGE_STACK);
    builder.spawn(body).map_err(|error| NoResult::Failed(format!("no thread: {error}")))?;
    match result.recv_timeout(limit) {
        Ok(result) => result.map_err(NoResult::Failed),
        Err(RecvTimeoutError::Timeout) => Err(NoResult::TooLong),
        Err(RecvTimeoutError::Disconnected) => Err(NoResult::Failed("its thread is gone".to_owned())),
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_too_long_or_panics_gives_no_result() {
        let soon = Duration::from_millis(50);
        assert_eq!(within(Duration::from_secs(60), "test", || 7), Ok(7));
        assert_eq!(within(soon, "test", || thread::sleep(Duration::from_secs(2))), Err(NoResult::TooLong));
        let failed = within::<()>(Duration::from_secs(60), "test", || panic!("on purpose"));
        assert_eq!(failed, Err(NoResult::Failed("on purpose".to_owned())));
    }
}
