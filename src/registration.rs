//! Hooks come and go (H1), and what a child's clean-up and a report want of them.

use crate::durations::Durations;
use crate::hook::{Calls, Hook, TIMED, message, say_panic};
use crate::hook_list::{self, Node};
use crate::runtime::{self, gate, hooks};
use crate::{sys, sys_signals};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Keeps a hook registered; dropping it takes the hook out (H1).
///
/// Dropping waits while a fork has the hook in its hands, from its prepare to the return of its undo, parent or child, and
/// asks a fork that has not committed to undo. Afterwards the hook is not called again. So it must not be dropped while
/// holding a lock that one of the hook's functions takes. Inside a hook it only marks.
///
/// `mem::forget` it to keep the hook for the life of the process.
#[must_use = "dropping a registration takes the hook out again"]
pub struct Registration {
    node: *const Node<Calls>,
    name: &'static str,
}

// SAFETY: `leave` may be called from any thread; the node is shared state of the list, not of a thread.
#[allow(unsafe_code)]
unsafe impl Send for Registration {}
// SAFETY: a shared Registration offers nothing.
#[allow(unsafe_code)]
unsafe impl Sync for Registration {}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("hook", &self.name).finish_non_exhaustive()
    }
}

/// Registers a hook: it takes part in every fork that begins from now on, coordinated or foreign.
///
/// Waits for nobody, also when called inside a hook or while another thread forks.
pub fn register(hook: Hook) -> Registration {
    static SEQUENCE: AtomicU32 = AtomicU32::new(1);
    let (rank, calls) = hook.into_calls(hooks().len() < TIMED);
    let name = calls.name;
    let key = hook_list::key(rank, SEQUENCE.fetch_add(1, Ordering::Relaxed));
    runtime::generation();
    let registration = Registration { node: hooks().join(key, calls), name };
    tidy();
    registration
}

impl Drop for Registration {
    fn drop(&mut self) {
        let inside = runtime::in_fork();
        // SAFETY: `node` is from `join` of this list, and this is its only leave.
        #[allow(unsafe_code)]
        unsafe {
            hooks().leave(self.node, !inside);
        }
        tidy();
    }
}

/// Links newcomers, unlinks and frees those who left, unless a fork is under way, which will do it.
pub(crate) fn tidy() {
    let me = runtime::me();
    if runtime::in_fork() || me.is_forking() {
        return;
    }
    // A signal handler that forks would wait for the role that this thread holds.
    let mask = sys_signals::block_all();
    if gate().try_role(me) {
        hooks().settle();
        gate().release_role();
    }
    sys_signals::set_mask(&mask);
    hooks().collect(free);
}

/// What a hook's functions own may panic where it is dropped: that is not to end a fork that has made its child.
fn free(calls: Calls) {
    let name = calls.name;
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(calls))) {
        if !say_panic(name, b"its own drop", &message(&*payload)) {
            runtime::count().unreported.fetch_add(1, Ordering::Relaxed);
        }
        // Its destructor may panic in turn.
        #[allow(clippy::mem_forget)]
        std::mem::forget(payload);
    }
}

/// Runs the clean-ups in a noexec child, by falling rank; how many, and how many of them panicked.
#[inline(always)]
pub(crate) fn clean_up() -> (usize, usize) {
    // The code of the rest is a page that a child of a program without hooks need not touch.
    if hooks().is_empty() || runtime::is_off() { (0, 0) } else { clean_up_each() }
}

#[inline(never)]
fn clean_up_each() -> (usize, usize) {
    let me = runtime::me();
    let mut found = Vec::new();
    let mask = sys_signals::block_all();
    // The child's own threads may be registering; a fork by one of them runs no clean-up, so missing it here loses nothing.
    while !gate().try_role(me) {
        sys::yield_now();
    }
    hooks().each_living(|_, h| found.extend(h.cleanup().map(|f| (h.name, Arc::clone(f)))));
    gate().release_role();
    sys_signals::set_mask(&mask);
    let mut panicked = 0;
    for (name, f) in &found {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(&**f)) {
            panicked += 1;
            if !say_panic(name, b"cleanup", &message(&*payload)) {
                runtime::count().unreported.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    (found.len(), panicked)
}

/// How often `list` asks for the hooks, and its rest in between, in ns.
const ASKS: (u32, u64) = (50, 100_000);

/// Names and ranks in the order of prepare; `None` if a fork has the hooks in its hands and does not let go of them soon.
pub(crate) fn list() -> Option<Vec<(&'static str, i32, Durations)>> {
    let me = runtime::me();
    let generation = runtime::generation_here();
    if runtime::in_fork() || me.is_forking() {
        return None;
    }
    for _ in 0..ASKS.0 {
        let mut found = Vec::new();
        // As in `tidy`, which has the role for an instant too.
        let mask = sys_signals::block_all();
        let ours = gate().try_role(me);
        if ours {
            hooks().each_living(|key, h| found.push((h.name, hook_list::rank(key), h.waited(generation))));
            gate().release_role();
        }
        sys_signals::set_mask(&mask);
        if ours {
            hooks().collect(free);
            found.reverse();
            return Some(found);
        }
        sys::sleep(ASKS.1);
    }
    None
}
