//! One descriptor number's word in the registry (F4, G6). Pure protocol, compiled by loom.
//!
//! # A word
//! | bits  | meaning                                                                                   |
//! |-------|-------------------------------------------------------------------------------------------|
//! | 0-1   | 0 not registered, 1 [`Kind::Cleanup`], 2 [`Kind::Close`]                                  |
//! | 2     | registered while a dirty fork was under way (below)                                       |
//! | 3     | registered by a child that has yet to clean up: its clean-up leaves it alone              |
//! | 4-31  | generation: moved on by each registration, kept by all else                               |
//!
//! The word as registered, without bits 2 and 3, is the `CareFd`'s *stamp*: it is live while the word equals it. A child that closes a number
//! clears bits 0-1, so that the stamp never fits again, also when the number is in use once more.
//!
//! # Who writes
//! The number's owner, and nobody else: between the kernel handing the number out and taking it back there is one. So
//! registering is plain loads and stores. From one owner to the next the kernel orders them (close and open of one
//! number go through one lock). In a child, the thread that cleans up; it shares with their owners only what the child itself
//! registered, and takes bit 3 off that in one step.
//!
//! # Dirty forks
//! The kernel copies the descriptors before the memory, milliseconds before in a large process. After a dirty fork, during
//! which other threads go on, a child may so find a number registered that was another's when the descriptors were copied:
//! closing it would close a stranger's (G6). So what is registered while one is under way is marked, and its child
//! forgets what is marked. `Dirty::begins` and `register` pair like the gate's shutting and entering: either the owner sees
//! the fork and marks, or the open was over before the descriptors were copied.

use crate::sync::{AtomicU32, Ordering, fault, fence_by_other_means, heavy_fence, light_fence};

use Ordering::{Acquire, Relaxed, Release};

pub(crate) const KIND: u32 = 3;
pub(crate) const MARK: u32 = 4;
const YOUNG: u32 = 8;
const GENERATION: u32 = 16;

/// When a child closes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    Cleanup = 1,
    Close = 2,
}

impl Kind {
    /// What a word or stamp says; `None` if it is not registered.
    pub(crate) fn of(word: u32) -> Option<Kind> {
        match word & KIND {
            0 => None,
            1 => Some(Kind::Cleanup),
            _ => Some(Kind::Close),
        }
    }
}

/// What a number's word says to who holds a stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Live,
    /// Closed by a child's clean-up, or at its fork.
    Closed,
    /// Registered again since, by another owner.
    Taken,
}

/// How many dirty forks are under way.
#[derive(Debug)]
pub(crate) struct Dirty(AtomicU32);

impl Dirty {
    #[cfg(not(loom))]
    pub(crate) const fn new() -> Self {
        Dirty(AtomicU32::new(0))
    }

    #[cfg(loom)]
    pub(crate) fn new() -> Self {
        Dirty(AtomicU32::new(0))
    }

    /// Before a dirty fork, in its prepare handler: from here on registrations are marked. Async-signal-safe.
    pub(crate) fn begins(&self) {
        self.0.fetch_add(1, Relaxed);
        if !heavy_fence() {
            fence_by_other_means();
        }
    }

    /// As `begins` where no other thread is in a region, and those to come learn of it by the gate's word. Async-signal-safe.
    pub(crate) fn begins_behind_the_gate(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// After it, in the parent. Marks stay: the child of another dirty fork leaks what bears one, which it may. Async-signal-safe.
    pub(crate) fn ends(&self) {
        self.0.fetch_sub(1, Relaxed);
    }

    /// After it, in the child. Looks first: most children need not write to that page.
    pub(crate) fn reset(&self) {
        if self.0.load(Relaxed) != 0 {
            self.0.store(0, Relaxed);
        }
    }
}

/// Registers the number; its stamp. The caller owns it, since before this call. Async-signal-safe.
#[inline(always)]
pub(crate) fn register(word: &AtomicU32, dirty: &Dirty, kind: Kind) -> u32 {
    register_with(word, dirty, kind, 0)
}

/// As `register`, by a child of its own, before the end of its clean-up.
pub(crate) fn register_young(word: &AtomicU32, dirty: &Dirty, kind: Kind) -> u32 {
    register_with(word, dirty, kind, YOUNG)
}

#[inline(always)]
fn register_with(word: &AtomicU32, dirty: &Dirty, kind: Kind, young: u32) -> u32 {
    let stamp = (word.load(Acquire) & !(KIND | MARK | YOUNG)).wrapping_add(GENERATION) | kind as u32;
    light_fence();
    let mark = if dirty.0.load(Relaxed) == 0 || fault("registered_unmarked") { 0 } else { MARK };
    word.store(stamp | mark | young, Release);
    stamp
}

/// Ends the registration that gave `stamp`, and calls `close` then, not before: from its close on the number may be another's,
/// and the child of a dirty fork closes what is registered. False, and nothing done, if it is not live here.
#[inline(always)]
pub(crate) fn unregister(word: &AtomicU32, stamp: u32, close: impl FnOnce()) -> bool {
    if !fits(word.load(Relaxed), stamp) {
        return false;
    }
    if fault("closed_before_unregistered") {
        close();
        word.store(stamp & !KIND, Release);
        return true;
    }
    word.store(stamp & !KIND, Release);
    close();
    true
}

/// Whether the registration that gave `stamp` still holds.
#[inline(always)]
pub(crate) fn fits(word: u32, stamp: u32) -> bool {
    word & !(MARK | YOUNG) == stamp
}

/// As `fits`, and why not.
pub(crate) fn state(word: u32, stamp: u32) -> State {
    match word {
        word if fits(word, stamp) => State::Live,
        word if word & KIND == 0 => State::Closed,
        _ => State::Taken,
    }
}

/// A fork has made it another child's: like any other from here on.
pub(crate) fn grow_up(word: &AtomicU32) {
    let w = word.load(Relaxed);
    if w & YOUNG != 0 {
        // Fails where its owner ends the registration: then there is nothing to take off.
        let _ended = word.compare_exchange(w, w & !YOUNG, Relaxed, Relaxed);
    }
}

/// Whether the clean-up is to close it. What this child registered itself has been passed by then, and is like any other; one look,
/// since its owner, another thread, may end that registration and begin the next.
pub(crate) fn is_inherited(word: &AtomicU32) -> bool {
    let w = word.load(Relaxed);
    grow_up(word);
    w & KIND != 0 && w & YOUNG == 0
}

/// In a child that closes the number.
pub(crate) fn closed(word: &AtomicU32) {
    word.store(word.load(Relaxed) & !KIND, Relaxed);
}

/// In the child of a dirty fork, before anything is closed: what is marked is not registered here.
pub(crate) fn forget_marked(word: &AtomicU32) {
    let w = word.load(Relaxed);
    if w & MARK != 0 {
        word.store(w & !(KIND | MARK | YOUNG), Relaxed);
    }
}
