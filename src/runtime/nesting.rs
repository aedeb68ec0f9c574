//! Which of libc's forks is the one that a coordinated fork called.
//!
//! Handlers that others registered after carefork's prepare before it. One of them may fork in there, and that foreign fork comes to
//! `on_prepare` first, on a thread whose seat names a coordinated fork. So there is a second set of handlers that only counts, registered with
//! the first coordinated fork of the process: it prepares before all that were registered until then, and is the last of them
//! in parent and child. What is registered later still, and forks in its prepare handler, is not told apart.

#![allow(unsafe_code)]

use super::*;

thread_local! {
    /// libc's forks under way on this thread, one inside the other, since the innermost coordinated fork began.
    static UNDER_WAY: Cell<u32> = const { Cell::new(0) };
}

/// Before a coordinated fork: the count begins anew, and is what this answers again for `counted`.
pub(crate) fn count_forks() -> u32 {
    static ASKED: AtomicBool = AtomicBool::new(false);
    // musl holds a lock over all handlers, so no handler can fork there, and registering would wait for other threads' forks.
    if cfg!(not(target_env = "musl")) && !ASKED.load(Relaxed) && !ASKED.swap(true, Relaxed) {
        // SAFETY: the handlers stay loaded, as the first three do. Where there is no memory for them nothing is told apart.
        unsafe { libc::pthread_atfork(Some(begins), Some(ends), Some(ends)) };
    }
    UNDER_WAY.replace(0)
}

/// After it, on both sides.
pub(crate) fn counted(before: u32) {
    UNDER_WAY.set(before);
}

/// The fork that has come to `on_prepare` was made by a handler, inside another.
pub(super) fn is_inner() -> bool {
    UNDER_WAY.get() > 1
}

extern "C" fn begins() {
    UNDER_WAY.set(UNDER_WAY.get() + 1);
}

extern "C" fn ends() {
    UNDER_WAY.set(UNDER_WAY.get().saturating_sub(1));
}
