//! What the prepare handler of a fork leaves for the parent or child handler on the same thread.
//!
//! It lies in the thread's seat and not in thread-local storage: the seat is written by every fork anyway, and each further page
//! that is written costs a page fault in the parent and one in the child.

#![allow(unsafe_code)]

use std::cell::Cell;

/// How far a thread's fork is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Stage {
    /// 0, as fresh memory says.
    None = 0,
    /// A handler is at work, on the way to a commitment or back from it: a fork on this thread is nested, made by a hook.
    Working,
    /// Gate shut by this word, hooks prepared, role held.
    Committed(u32),
    /// A coordinated fork that will not be: libc forks all the same, the child ends at once.
    Refused,
    /// A foreign fork past its budget, or against a veto.
    Dirty,
    /// In the child, `on_child` has done its work already (another library's child handler came here first).
    Mended,
}

/// Cells, because hooks come back here while a handler is at work on it. All zero is a new one.
#[derive(Debug)]
pub(crate) struct Passage {
    pub(crate) stage: Cell<Stage>,
    /// Forks that a hook or another library's handler made while this one was under way.
    pub(crate) nested: Cell<u32>,
    pub(crate) errno: Cell<i32>,
    /// What a seat names while this fork, a foreign one, is made inside that one by another library's handler.
    pub(crate) outer: Cell<*mut ()>,
    /// Where errno is, or null before the first fork: a child that asks libc for it touches another page of code.
    pub(crate) errno_at: Cell<*mut i32>,
    /// When the prepare handler returned.
    pub(crate) begun: Cell<u64>,
    /// The mask from before, while signals are `blocked`.
    mask: Cell<u64>,
    blocked: Cell<bool>,
    /// Something was left out: budget, veto.
    pub(crate) dirty: Cell<bool>,
    /// The gate is open: the registry marks what is registered meanwhile.
    pub(crate) marking: Cell<bool>,
    /// In the parent of a coordinated fork: its handler could not tell whether there is a child, and left everything to `passed`.
    pub(crate) undecided: Cell<bool>,
    /// In the parent: a waiter reopened the gate before the copy was whole.
    pub(crate) late: Cell<bool>,
    /// In the child: a coordinated fork made it.
    pub(crate) coordinated: Cell<bool>,
    /// libc's forks under way on this thread, one inside the other, since the innermost coordinated fork began.
    pub(crate) under_way: Cell<u8>,
}

// SAFETY: a seat is one thread's at a time, and only that thread looks at its passage. Who clears what another left there has
// the seat by now.
unsafe impl Sync for Passage {}

impl Passage {
    pub(crate) const fn new() -> Self {
        Self {
            stage: Cell::new(Stage::None),
            nested: Cell::new(0),
            errno: Cell::new(0),
            outer: Cell::new(std::ptr::null_mut()),
            errno_at: Cell::new(std::ptr::null_mut()),
            begun: Cell::new(0),
            mask: Cell::new(0),
            blocked: Cell::new(false),
            dirty: Cell::new(false),
            marking: Cell::new(false),
            undecided: Cell::new(false),
            late: Cell::new(false),
            coordinated: Cell::new(false),
            under_way: Cell::new(0),
        }
    }

    /// As new: a thread has taken the seat, and another may have left it without a word.
    pub(crate) fn clear(&self) {
        let Passage { stage, nested, outer, errno_at, blocked, dirty, marking, undecided, late, coordinated, .. } =
            self;
        self.under_way.set(0);
        stage.set(Stage::None);
        nested.set(0);
        outer.set(std::ptr::null_mut());
        errno_at.set(std::ptr::null_mut());
        for flag in [blocked, dirty, marking, undecided, late, coordinated] {
            flag.set(false);
        }
    }

    /// Signals are blocked; `before` is the mask from before.
    pub(crate) fn put_mask(&self, before: u64) {
        self.mask.set(before);
        self.blocked.set(true);
    }

    pub(crate) fn has_mask(&self) -> bool {
        self.blocked.get()
    }

    /// For whoever puts it back, once.
    pub(crate) fn take_mask(&self) -> Option<u64> {
        self.blocked.replace(false).then(|| self.mask.get())
    }
}
