//! The locks of std's output and error, as a fork holds them (L6).
//!
//! What it notes lies with everything else that a fork writes (`runtime`): a page of its own would be copied on both sides.

#![allow(unsafe_code)]

use crate::print_wait::{Stream, WaitWord};
use crate::sys;
use std::cell::{Cell, UnsafeCell};
use std::io::{self, StderrLock, StdoutLock, Write};
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use Ordering::{Relaxed, Release};

/// Standard output is noted before standard error is waited for: a child of another thread's fork finds it free meanwhile.
#[derive(Debug)]
struct Held {
    // Let go of in this order.
    err: Option<StderrLock<'static>>,
    out: StdoutLock<'static>,
}

/// Used by the holder of the gate's role only, and by a child's first thread.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) wait: WaitWord,
    held: UnsafeCell<Option<ManuallyDrop<Held>>>,
    /// How many hooks have taken them for the fork under way.
    takers: AtomicU32,
    /// Something may be in the buffer still.
    unflushed: Cell<bool>,
}

// SAFETY: one thread at a time uses it (see above), and no lock is in it outside a fork.
unsafe impl Sync for Streams {}

impl Streams {
    pub(crate) const fn new() -> Self {
        Self {
            wait: WaitWord::new(),
            held: UnsafeCell::new(None),
            takers: AtomicU32::new(0),
            unflushed: Cell::new(false),
        }
    }

    /// Waits for whoever prints. Allocates nothing: std's locks live in its statics, the buffer is there.
    pub(crate) fn take(&self, tid: u32, now: fn() -> u64) {
        if self.takers.load(Relaxed) == 0 {
            let wait = self.wait.begin(tid, Stream::Output, now());
            let mut out = io::stdout().lock();
            self.flush(&mut out);
            // SAFETY: see `Sync`; no reference into the cell outlives a statement.
            unsafe { *self.held.get() = Some(ManuallyDrop::new(Held { out, err: None })) };
            // Release: what `abandon` finds counted in a child's copy of this page, it finds there.
            self.takers.store(1, Release);
            let mut noted = Noted(Some(self));
            wait.goes_on(Stream::Error, now());
            let err = io::stderr().lock();
            wait.ends(now());
            // SAFETY: as above.
            if let Some(held) = unsafe { &mut *self.held.get() } {
                held.err = Some(err);
            }
            noted.0 = None;
        } else {
            // Hooks that prepared since the first of the guards may have printed.
            // SAFETY: as above.
            if let Some(held) = unsafe { &mut *self.held.get() } {
                self.flush(&mut held.out);
            }
            self.takers.store(self.takers.load(Relaxed) + 1, Release);
        }
    }

    fn flush(&self, out: &mut StdoutLock<'static>) {
        // An error is a stream that takes nothing more; what is left in the buffer is as if there had been no room.
        self.unflushed.set(!sys::takes_now(libc::STDOUT_FILENO) || out.flush().is_err());
    }

    /// What the last of those who took them lets go of.
    #[inline(always)]
    fn give_back(&self) -> Option<Held> {
        let takers = self.takers.load(Relaxed);
        if takers != 0 {
            self.takers.store(takers - 1, Relaxed);
        }
        if takers != 1 {
            return None;
        }
        // A copy of this page that is made from here on is of streams that `abandon` leaves alone: it must not find them half let go of.
        fence(Release);
        // SAFETY: as in `take`.
        let held = unsafe { &mut *self.held.get() };
        held.take().map(ManuallyDrop::into_inner)
    }

    /// In the parent, or where there was no fork.
    pub(crate) fn release(&self) {
        if self.takers.load(Relaxed) == 1 {
            // The pages that letting go writes are copied on the first write after a fork, and that may have to wait for another thread's
            // fork: while they are noted still, or that one's child would find them held. One after the other, not nested.
            drop(io::stderr().lock());
            drop(io::stdout().lock());
        }
        drop(self.give_back());
    }

    /// In the child. What the parent could not flush is its to write: `throw_away` is given the stream with what is left of it.
    #[inline(always)]
    pub(crate) fn release_in_child(&self, throw_away: impl FnOnce(&mut StdoutLock<'static>)) {
        // Before other hooks print behind it.
        if self.unflushed.replace(false) {
            // SAFETY: as in `take`.
            if let Some(held) = unsafe { &mut *self.held.get() } {
                throw_away(&mut held.out);
            }
        }
        drop(self.give_back());
    }

    /// In a child whose own fork has not taken them, by its first thread: another thread's had, which is not here to let go of them. A plain
    /// fork's child would not have found them held.
    pub(crate) fn abandon(&self) {
        if self.takers.load(Relaxed) != 0 {
            self.takers.store(1, Relaxed);
            drop(self.give_back());
        }
    }
}

/// Lets go again where the rest of `take` panics.
struct Noted<'a>(Option<&'a Streams>);

impl Drop for Noted<'_> {
    fn drop(&mut self) {
        if let Some(streams) = self.0 {
            drop(streams.give_back());
        }
    }
}
