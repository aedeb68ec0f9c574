//! The locks of std's output and error, as a fork holds them (L6).
//!
//! What it notes lies with everything else that a fork writes (`runtime`): a page of its own would be copied on both sides.

#![allow(unsafe_code)]

use crate::print_wait::{Stream, WaitWord};
use crate::sys;
use std::cell::{Cell, UnsafeCell};
use std::io::{self, StderrLock, StdoutLock, Write};
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU32, Ordering};

use Ordering::{Relaxed, Release};

type Held = (StdoutLock<'static>, StderrLock<'static>);

/// Used by the holder of the gate's role only, and by a child's one thread.
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
            // An error is a stream that takes nothing more; what is left in the buffer is as if there had been no room.
            self.unflushed.set(!sys::takes_now(libc::STDOUT_FILENO) || out.flush().is_err());
            wait.goes_on(Stream::Error, now());
            let err = io::stderr().lock();
            wait.ends(now());
            // SAFETY: see `Sync`; no reference into the cell outlives a statement.
            unsafe { *self.held.get() = Some(ManuallyDrop::new((out, err))) };
        }
        // Release: what `abandon` finds counted in a child's copy of this page, it finds there.
        self.takers.store(self.takers.load(Relaxed) + 1, Release);
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
        // Pairs with the Release in `take`'s next turn by being before it: not counted any more, and so not for `abandon`, before any is let go of.
        std::sync::atomic::fence(Release);
        // SAFETY: as in `take`.
        let held = unsafe { &mut *self.held.get() };
        held.take().map(ManuallyDrop::into_inner)
    }

    /// In the parent, or where there was no fork.
    pub(crate) fn release(&self) {
        if let Some((out, err)) = self.give_back() {
            drop(err);
            drop(out);
        }
    }

    /// In the child. What the parent could not flush is its to write: `throw_away` is given the stream with what is left of it.
    #[inline(always)]
    pub(crate) fn release_in_child(&self, throw_away: impl FnOnce(&mut StdoutLock<'static>)) {
        if let Some((mut out, err)) = self.give_back() {
            if self.unflushed.replace(false) {
                throw_away(&mut out);
            }
            drop(err);
            drop(out);
        }
    }

    /// In a child whose own fork has not taken them: another thread's had, which is not here to let go of them. A plain fork's child
    /// would not have found them held.
    pub(crate) fn abandon(&self) {
        if self.takers.load(Relaxed) != 0 {
            self.takers.store(1, Relaxed);
            self.release();
        }
    }
}
