//! Whether the child of a coordinated fork saw the gate shut to the end (G11).
//!
//! A waiter may reopen the gate just after the fork and before the parent's handler: then the child is clean, and only the child
//! knows. It says so in a page that parent and child share, in a word of the forking thread's seat. A child never uses
//! its parent's page for forks of its own.

#![allow(unsafe_code)]

use crate::gate::Slot;
use crate::sys;
use std::io;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

const WORDS: u32 = (sys::PAGE / size_of::<AtomicU32>()) as u32;
const GOOD: u32 = 1;
const BAD: u32 = 2;
/// The parent sleeps on the word. Ticket and this bit are the parent's, before the child has spoken.
const ASKED: u32 = 3;

/// Where the words are.
#[derive(Debug)]
pub(crate) struct Pages {
    mine: AtomicPtr<AtomicU32>,
    /// The parent's page, in a child that has not needed one of its own yet.
    old: AtomicPtr<AtomicU32>,
}

impl Pages {
    pub(crate) const fn new() -> Self {
        Self { mine: AtomicPtr::new(std::ptr::null_mut()), old: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// Makes sure that there is a page. Before the fork.
    pub(crate) fn ready(&self) -> io::Result<()> {
        if !self.mine.load(Ordering::Acquire).is_null() {
            return Ok(());
        }
        let page = sys::map(sys::PAGE, true)?;
        let null = std::ptr::null_mut();
        if self.mine.compare_exchange(null, page.cast(), Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: another thread was faster; nobody else knows this mapping.
            unsafe { sys::unmap(page, sys::PAGE) };
        }
        let old = self.old.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if !old.is_null() {
            // SAFETY: `forget` put it there, whose process held no reference into it; the swap made it this thread's.
            unsafe { sys::unmap(old.cast(), sys::PAGE) };
        }
        Ok(())
    }

    fn word(&self, seat: u32) -> Option<&'static AtomicU32> {
        let page = self.mine.load(Ordering::Acquire);
        if page.is_null() {
            return None;
        }
        // SAFETY: the page holds WORDS words and the index is below that.
        let word = unsafe { page.add((seat % WORDS) as usize) };
        // SAFETY: zeroed by the kernel, which is a valid AtomicU32; unmapped only in children, after `forget`.
        Some(unsafe { &*word })
    }

    /// In the child's handler, before the gate is reset. Async-signal-safe.
    pub(crate) fn say(&self, me: Option<&Slot>, ticket: u32, good: bool) {
        if let Some(w) = me.and_then(|m| self.word(m.id())) {
            // Nearly always nobody asks.
            if w.swap(ticket << 2 | if good { GOOD } else { BAD }, Ordering::AcqRel) & 3 == ASKED {
                sys::futex_wake_shared(w);
            }
        }
    }

    /// In the parent: what the child said, or true if it died before it could.
    pub(crate) fn ask(&self, me: &Slot, ticket: u32, is_dead: impl Fn() -> bool) -> bool {
        let Some(w) = self.word(me.id()) else { return true };
        let said = |word: u32| {
            let spoken = word >> 2 == ticket & (u32::MAX >> 2) && matches!(word & 3, GOOD | BAD);
            spoken.then_some(word & 3 == GOOD)
        };
        loop {
            let seen = w.load(Ordering::Acquire);
            if let Some(good) = said(seen) {
                return good;
            }
            if is_dead() {
                // It may have spoken since: a child that is not to be ends at once.
                return said(w.load(Ordering::Acquire)).unwrap_or(true);
            }
            // What is left of an earlier fork of this thread gives way to the question.
            let asked = ticket << 2 | ASKED;
            if seen == asked || w.compare_exchange(seen, asked, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                // With an end: a child that dies here wakes nobody.
                sys::futex_wait_shared(w, asked, 1_000_000);
            }
        }
    }

    /// In a child, whose one thread holds no reference into it: the page is the parent's. Unmapped with the first fork of this
    /// process's own, since most children make none.
    pub(crate) fn forget(&self) {
        let page = self.mine.swap(std::ptr::null_mut(), Ordering::Relaxed);
        if !page.is_null() {
            self.old.store(page, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat() -> Slot {
        let seat = Slot::new();
        seat.id.store(1, Ordering::Relaxed);
        seat
    }

    /// It speaks and ends, both between the parent's look at the word and its question whether the child is dead.
    #[test]
    fn a_child_that_has_spoken_is_believed_after_its_death() {
        for good in [true, false] {
            let (pages, seat) = (Pages::new(), seat());
            pages.ready().unwrap();
            let said = pages.ask(&seat, 7, || {
                pages.say(Some(&seat), 7, good);
                true
            });
            assert_eq!(said, good);
        }
    }

    #[test]
    fn a_child_that_died_first_was_one() {
        let (pages, seat) = (Pages::new(), seat());
        pages.ready().unwrap();
        // What the fork before this one left there.
        pages.say(Some(&seat), 6, false);
        assert!(pages.ask(&seat, 7, || true));
    }
}
