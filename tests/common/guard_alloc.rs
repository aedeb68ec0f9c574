//! An allocator that ends the process where allocating, or freeing, is forbidden.

use super::raw;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

/// The exit code of a process that used the allocator while it was armed.
pub const TRIPPED: i32 = 77;

/// `#[global_allocator] static ALLOC: ForkGuardAlloc = ForkGuardAlloc;` The system's allocator, until the calling
/// thread, or the process, is armed; then any use is reported with one `write(2)` and `_exit(77)`.
/// A child inherits the arming of the thread that forked.
pub struct ForkGuardAlloc;

thread_local! {
    // Const and without a destructor: no lazy initialisation, so that asking is allowed in any state of the thread.
    static ARMED: Cell<bool> = const { Cell::new(false) };
}
// Relaxed everywhere: it is a test's switch, and orders nothing.
static ALL_ARMED: AtomicBool = AtomicBool::new(false);

impl ForkGuardAlloc {
    /// For the calling thread. Async-signal-safe, as are the others.
    pub fn arm() {
        ARMED.set(true);
    }

    pub fn disarm() {
        ARMED.set(false);
    }

    /// For every thread.
    pub fn arm_all() {
        ALL_ARMED.store(true, Ordering::Relaxed);
    }

    pub fn disarm_all() {
        ALL_ARMED.store(false, Ordering::Relaxed);
    }

    /// Runs `f` armed. Not for an `f` that panics: the message is allocated.
    pub fn armed<R>(f: impl FnOnce() -> R) -> R {
        Self::arm();
        let result = f();
        Self::disarm();
        result
    }

    fn pass(what: &str, size: usize) {
        if ARMED.get() || ALL_ARMED.load(Ordering::Relaxed) {
            raw::Line::new()
                .text("ForkGuardAlloc: ")
                .text(what)
                .text(" of ")
                .num(size as i64)
                .text(" bytes while armed, in process ")
                .num(raw::getpid().into())
                .send();
            raw::exit_now(TRIPPED);
        }
    }
}

// SAFETY: every call is handed to `System` as it came, or does not return.
unsafe impl GlobalAlloc for ForkGuardAlloc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::pass("alloc", layout.size());
        // SAFETY: our caller's promise is the one `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        Self::pass("dealloc", layout.size());
        // SAFETY: our caller's promise; the block came from `System`, as all of ours do.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::pass("alloc_zeroed", layout.size());
        // SAFETY: our caller's promise is the one `System` asks for.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        Self::pass("realloc", new_size);
        // SAFETY: our caller's promise; the block came from `System`, as all of ours do.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}
