//! Which of libc's forks is the one that a coordinated fork called.
//!
//! Handlers that others registered after carefork's prepare before it. One of them may fork in there, and that foreign fork comes to
//! `on_prepare` first, on a thread whose seat names a coordinated fork. So there is a second set of handlers that only counts, registered with
//! the first coordinated fork of the process: it prepares before all that were registered until then, and is the last of them
//! in parent and child. What is registered later still, and forks in its prepare handler, is not told apart.

#![allow(unsafe_code)]

use super::*;

/// Before a coordinated fork: the count begins anew, and is what this answers again for `counted`.
pub(crate) fn count_forks(me: &Slot) -> u8 {
    static ASKED: AtomicBool = AtomicBool::new(false);
    // musl holds a lock over all handlers, so no handler can fork there, and registering would wait for other threads' forks.
    if cfg!(not(target_env = "musl")) && !ASKED.load(Relaxed) && !ASKED.swap(true, Relaxed) {
        // SAFETY: the handlers stay loaded, as the first three do. Where there is no memory for them nothing is told apart.
        unsafe { libc::pthread_atfork(Some(begins), Some(ends), Some(ends)) };
    }
    me.passage.under_way.replace(0)
}

/// After it, on both sides.
pub(crate) fn counted(me: &Slot, before: u8) {
    me.passage.under_way.set(before);
}

/// The fork that has come to `on_prepare` was made by a handler, inside another.
pub(super) fn is_inner(me: &Slot) -> bool {
    me.passage.under_way.get() > 1
}

// With the rest of what a child runs: no page of code of its own.
#[unsafe(link_section = ".text_carefork")]
extern "C" fn begins() {
    // A thread without a seat is in no coordinated fork.
    if let Some(me) = seated() {
        me.passage.under_way.set(me.passage.under_way.get().saturating_add(1));
    }
}

#[unsafe(link_section = ".text_carefork")]
extern "C" fn ends() {
    if let Some(me) = seated() {
        me.passage.under_way.set(me.passage.under_way.get().saturating_sub(1));
    }
}
