//! What a fork's prepare handler collects for an error or a report, one place for each seat.
//!
//! Not on the stack, nor in thread-local storage: that much between the frames round libc's fork, or between a thread's own block and errno,
//! and a fork writes one page more, which is copied on both sides. Written only where something is in a fork's way.

#![allow(unsafe_code)]

use super::*;
use crate::chunks::{Chunks, FIRST, Zeroed};
use std::mem::MaybeUninit;

pub(super) struct Collected {
    pub(super) report: ManuallyDrop<Report>,
    pub(super) busy: Busy,
}

impl Collected {
    pub(super) const NEW: Collected = Collected { report: ManuallyDrop::new(Report::new()), busy: Busy::NONE };

    /// Before a fork's first try: nobody is in its way yet.
    pub(super) fn forget(&mut self) {
        self.report.forget();
        self.busy.forget();
    }
}

struct Place {
    made: Cell<bool>,
    collected: UnsafeCell<MaybeUninit<Collected>>,
}

// SAFETY: a place is its seat's, which is one thread's at a time.
unsafe impl Sync for Place {}

// SAFETY: zero is one that is not made yet.
unsafe impl Zeroed for Place {}

static PLACES: Chunks<Place> = Chunks::new(
    [const { Place { made: Cell::new(false), collected: UnsafeCell::new(MaybeUninit::uninit()) } }; FIRST as usize],
);

/// Makes sure that the seat has its place. Async-signal-safe.
pub(super) fn ready(me: &Slot) -> bool {
    PLACES.grow(me.id() - 1)
}

/// The calling thread's; `None` where its seat was never made `ready`. Async-signal-safe.
///
/// # Safety
/// `me` is the calling thread's seat, and nobody on this thread has a reference from an earlier call.
pub(super) unsafe fn collected(me: &Slot) -> Option<&'static mut Collected> {
    let place = PLACES.at(me.id() - 1)?;
    // SAFETY: this thread's own, and the only reference (the caller's promise).
    let collected = unsafe { &mut *place.collected.get() };
    if !place.made.get() {
        collected.write(Collected::NEW);
        place.made.set(true);
    }
    // SAFETY: made above, or earlier.
    Some(unsafe { collected.assume_init_mut() })
}
