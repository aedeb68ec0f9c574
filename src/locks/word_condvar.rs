//! A condition variable in one word (L1-L3).
//!
//! The word is a sequence that every notification moves on, and `WAIT`: somebody may sleep on it. The bit may be set with nobody
//! asleep; no waiter is counted.
//!
//! # Protocol
//! - A waiter sets the bit and reads the sequence *under the mutex*, unlocks, and sleeps while the word is what it read. So who
//!   changes the condition under the mutex and notifies afterwards sees the bit, and a notification between the unlocking and
//!   the sleep has moved the word.
//! - A notification moves the sequence first and wakes then. So a waiter that was woken finds the sequence moved, and says so
//!   even where its time is up as well: it would take the wake-up of another with it otherwise.
//! - Waking one leaves the bit: others may sleep. Waking all takes it off, in the same step that moves the sequence: who
//!   sets it later sleeps on a later word.
//!
//! All of it is Relaxed: the mutex orders the condition, and the bit against who looks for it.

use crate::sync::{self, ANY, AtomicU32, Ordering::Relaxed, Wake, fault};

/// Somebody may sleep on the word.
const WAIT: u32 = 1;
const STEP: u32 = 2;

#[derive(Debug)]
pub(crate) struct WordCondvar {
    word: AtomicU32,
}

impl WordCondvar {
    #[cfg(not(loom))]
    pub(crate) const fn new() -> Self {
        Self { word: AtomicU32::new(0) }
    }

    #[cfg(loom)]
    pub(crate) fn new() -> Self {
        Self { word: AtomicU32::new(0) }
    }

    /// As a child finds it.
    #[cfg(loom)]
    pub(crate) fn copied(&self) -> Self {
        Self { word: AtomicU32::new(self.word.load(Relaxed)) }
    }

    /// Sleeps until a notification or `deadline`, or for no reason; false if only the time is up. The caller holds the mutex that
    /// `unlock` unlocks, and locks it again afterwards.
    pub(crate) fn wait(&self, deadline: Option<u64>, unlock: impl FnOnce()) -> bool {
        let mut seen = self.word.fetch_or(WAIT, Relaxed) | WAIT;
        unlock();
        if fault("condvar_looks_late") {
            seen = self.word.load(Relaxed);
        }
        if sync::futex_wait(&self.word, seen, ANY, deadline) == Wake::Look {
            return true;
        }
        (self.word.load(Relaxed) ^ seen) & !WAIT != 0 && !fault("condvar_timeout_eats")
    }

    /// Wakes at most `count` of those who wait: 1, or all.
    pub(crate) fn notify(&self, count: u32) {
        let all = count != 1 || fault("condvar_one_takes_bit");
        let mut word = self.word.load(Relaxed);
        while word & WAIT != 0 {
            let next = if all { word & !WAIT } else { word };
            let next = if fault("condvar_stands") { next } else { next.wrapping_add(STEP) };
            match self.word.compare_exchange_weak(word, next, Relaxed, Relaxed) {
                Ok(_) => {
                    // The bit stays even if nobody was woken: a thread may have gone to sleep on this very word meanwhile.
                    let woke = sync::futex_wake(&self.word, count, ANY);
                    if !woke && fault("condvar_unused_bit_off") {
                        self.word.fetch_and(!WAIT, Relaxed);
                    }
                    return;
                }
                Err(now) => word = now,
            }
        }
    }
}
