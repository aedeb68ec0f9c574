//! A mutex in one word whose critical section is a region (L1-L3).
//!
//! # States
//! | owner | `WAIT` | |
//! |---|---|---|
//! | 0 | 0 | free |
//! | 0 | 1 | free, and a thread may sleep that nobody has woken yet: whoever takes it keeps the bit |
//! | id | 0 | held, nobody has asked for a wake-up |
//! | id | 1 | held, somebody may sleep: unlocking wakes one |
//!
//! The bit may be set with nobody asleep; no waiter is counted. Taking happens inside the region, sleeping outside (unless
//! the thread is in another region as well), so that nobody who sleeps here keeps a fork waiting, and no child finds a sleeper.

use crate::gate::{Gate, LOCK, Seats, Slot, Word};
use crate::sync::{self, ANY, AtomicU32, Ordering, Wake, fault};

use Ordering::{Acquire, Relaxed, Release};

/// Somebody may sleep on the word.
pub(crate) const WAIT: u32 = Word::Mutex.sleepers();

/// How often a taken lock is looked at before its thread sleeps.
const LOOKS: u32 = if cfg!(loom) { 0 } else { 40 };

#[derive(Debug)]
pub(crate) struct WordMutex {
    word: AtomicU32,
}

impl WordMutex {
    #[cfg(not(loom))]
    pub(crate) const fn new() -> Self {
        Self { word: AtomicU32::new(0) }
    }

    /// As a child may find it.
    #[cfg(test)]
    pub(super) fn holding(word: u32) -> Self {
        Self { word: AtomicU32::new(word) }
    }

    #[cfg(loom)]
    pub(crate) fn new() -> Self {
        Self { word: AtomicU32::new(0) }
    }

    #[cfg(loom)]
    pub(crate) fn copied(&self) -> Self {
        Self { word: AtomicU32::new(self.word.load(Relaxed)) }
    }

    /// Takes the lock.
    #[inline]
    pub(crate) fn lock<S: Seats>(&self, gate: &Gate<S>, me: &Slot) -> bool {
        let outermost = gate.enter(me, LOCK);
        // Acquire pairs with `unlock`'s Release.
        if self.word.compare_exchange(0, me.id(), Acquire, Relaxed).is_err() {
            self.lock_slow(gate, me, None);
        }
        outermost
    }

    /// Takes the lock or gives up at `deadline`; then no region is left open.
    pub(crate) fn lock_until<S: Seats>(&self, gate: &Gate<S>, me: &Slot, deadline: u64) -> bool {
        gate.enter_until(me, LOCK, Some(deadline))
            && (self.word.compare_exchange(0, me.id(), Acquire, Relaxed).is_ok()
                || self.lock_slow(gate, me, Some(deadline)))
    }

    /// Takes the lock if it is free. Waits at the gate, but not for the lock.
    #[inline]
    pub(crate) fn try_lock<S: Seats>(&self, gate: &Gate<S>, me: &Slot) -> bool {
        gate.enter(me, LOCK);
        let mut word = self.word.load(Relaxed);
        while word & !WAIT == 0 {
            match self.word.compare_exchange_weak(word, word | me.id(), Acquire, Relaxed) {
                Ok(_) => return true,
                Err(now) => word = now,
            }
        }
        gate.leave(me, LOCK);
        false
    }

    /// The calling thread holds the lock, and `me` is its seat.
    #[inline]
    pub(crate) fn unlock<S: Seats>(&self, gate: &Gate<S>, me: &Slot) {
        // Release pairs with the Acquire of the next owner.
        if self.word.swap(0, if fault("unlock_relaxed") { Relaxed } else { Release }) & WAIT != 0 {
            sync::futex_wake(&self.word, 1, ANY);
        }
        gate.leave(me, LOCK);
    }

    /// The calling thread holds the lock.
    pub(crate) fn is_mine(&self, me: &Slot) -> bool {
        self.word.load(Relaxed) & !WAIT == me.id()
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.word.load(Relaxed) & !WAIT != 0
    }

    /// Inside the region, with the lock taken by another. Returns inside the region with the lock (true), or outside
    /// without it.
    #[cold]
    #[inline(never)]
    fn lock_slow<S: Seats>(&self, gate: &Gate<S>, me: &Slot, deadline: Option<u64>) -> bool {
        // A thread that slept was woken alone: others may sleep still, so it takes the lock with the bit.
        let mut bit = 0;
        let mut looks = 0;
        loop {
            let word = self.word.load(Relaxed);
            if word & !WAIT == 0 {
                if self.word.compare_exchange(word, me.id() | word | bit, Acquire, Relaxed).is_ok() {
                    return true;
                }
                continue;
            }
            if looks < LOOKS && word & WAIT == 0 {
                looks += 1;
                sync::spin_loop();
                continue;
            }
            if word & WAIT == 0 && self.word.compare_exchange(word, word | WAIT, Relaxed, Relaxed).is_err() {
                continue;
            }
            let owner = word & !WAIT;
            if owner == me.id() && deadline.is_none() {
                gate.leave(me, LOCK);
                recursion();
            }
            if gate.has_ghosts() && gate.is_ghost(owner) {
                gate.leave(me, LOCK);
                ghost();
            }
            let before = me.sleeps(self.word_address(), Word::Mutex);
            if me.only(LOCK) {
                gate.leave(me, LOCK);
                let woke = sync::futex_wait(&self.word, owner | WAIT, ANY, deadline);
                me.woke(before);
                if woke == Wake::TimedOut {
                    return self.give_up();
                }
                if !gate.enter_until(me, LOCK, deadline) {
                    return self.give_up();
                }
            } else {
                gate.waits(me, owner);
                let woke = sync::futex_wait(&self.word, owner | WAIT, ANY, deadline);
                me.woke(before);
                gate.waits_no_more(me);
                if woke == Wake::TimedOut {
                    gate.leave(me, LOCK);
                    return self.give_up();
                }
            }
            bit = if fault("slept_without_bit") { 0 } else { WAIT };
        }
    }

    /// A wake-up that came together with the time-out is passed on: another sleeper is woken now, or by the present owner.
    fn give_up(&self) -> bool {
        if fault("timed_out_keeps_wake_up") {
            return false;
        }
        let mut word = self.word.load(Relaxed);
        while word & WAIT == 0 && word != 0 {
            match self.word.compare_exchange_weak(word, word | WAIT, Relaxed, Relaxed) {
                Ok(_) => return false,
                Err(now) => word = now,
            }
        }
        if word & !WAIT == 0 {
            sync::futex_wake(&self.word, 1, ANY);
        }
        false
    }

    #[cfg(not(loom))]
    fn word_address(&self) -> *const u32 {
        self.word.as_ptr()
    }

    #[cfg(loom)]
    fn word_address(&self) -> *const u32 {
        std::ptr::from_ref(&self.word).cast()
    }
}

/// Waiting would be for ever, inside a region: the lock that the thread holds already is one.
#[cold]
#[track_caller]
pub(crate) fn recursion() -> ! {
    panic!("carefork: this thread holds this lock already (or had its seat from one that ended holding it)")
}

/// Waiting would be for ever.
#[cold]
#[track_caller]
pub(crate) fn ghost() -> ! {
    panic!(
        "carefork: this lock was held by a thread that a fork left behind without waiting for it \
         (see carefork::lineage): nobody will ever release it here"
    )
}
