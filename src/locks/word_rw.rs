//! A readers-writer lock in one word whose critical sections are regions (L1-L3).
//!
//! # States
//! | `WRITER` | low bits | `UPGRADABLE` | |
//! |---|---|---|---|
//! | 0 | 0 | 0 | free, whatever the waiting bits say |
//! | 1 | owner's id | 0 | one writer |
//! | 0 | n | 0 | n readers |
//! | 0 | n | 1 | n readers, one of whom may become the writer |
//!
//! The waiting bits say that somebody may sleep; nobody is counted. Who makes the lock free (or leaves the upgradable reader
//! alone) takes the bits off and wakes all readers, the upgrader and one writer. They look again, and set their bits again if
//! they must sleep again. That one writer stands for those who sleep on: it takes the lock with `WRITERS_WAIT` set, and
//! where it gives up it wakes the next.
//!
//! A waiting writer keeps new readers out only while somebody holds the lock, who will come by to take the bit off. Not
//! where the present readers came before a fork: then the bit may be that of a thread which is not here.

use crate::gate::{Gate, LOCK, Seats, Slot, Word};
use crate::locks::word_mutex::{ghost, recursion};
use crate::sync::{self, AtomicU32, Ordering, Wake, fault};

use Ordering::{Acquire, Relaxed, Release};

pub(super) const WRITER: u32 = 1 << 31;
const READERS_WAIT: u32 = 1 << 30;
const WRITERS_WAIT: u32 = 1 << 29;
const UPGRADER_WAITS: u32 = 1 << 28;
const UPGRADABLE: u32 = 1 << 27;
pub(super) const COUNT: u32 = UPGRADABLE - 1;
const WAITS: u32 = READERS_WAIT | WRITERS_WAIT | UPGRADER_WAITS;
const _: () = assert!(WAITS == Word::Rw.sleepers());

const LOOKS: u32 = if cfg!(loom) { 0 } else { 40 };
/// How long a writer in a process with ghosts waits for readers from before the fork, who may be the forking thread's own.
const PATIENCE: u64 = 1_000_000_000;

#[derive(Debug)]
pub(crate) struct WordRw {
    word: AtomicU32,
    /// The generation (its low bits) in which the first of the present readers came.
    born: AtomicU32,
}

/// The lowest of the waiting bits.
#[cfg(test)]
pub(super) const FIRST_WAIT: u32 = UPGRADER_WAITS;

/// Who sleeps, in the futex's bits.
const READERS: u32 = 1;
const WRITERS: u32 = 2;
const UPGRADER: u32 = 4;

/// What a thread wants of the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    Read,
    /// Even before a waiting writer.
    ReadAgain,
    Upgradable,
    Write,
    /// From upgradable reader to writer.
    Upgrade,
}

impl Want {
    fn bit(self) -> u32 {
        match self {
            Want::Read | Want::ReadAgain | Want::Upgradable => READERS_WAIT,
            Want::Write => WRITERS_WAIT,
            Want::Upgrade => UPGRADER_WAITS,
        }
    }

    fn sleeper(self) -> u32 {
        match self {
            Want::Read | Want::ReadAgain | Want::Upgradable => READERS,
            Want::Write => WRITERS,
            Want::Upgrade => UPGRADER,
        }
    }

    /// The word after getting it, or `None` if it is not to be had.
    #[inline(always)]
    fn attempt(self, word: u32, me: u32) -> Option<u32> {
        let (held, count) = (word & (WRITER | COUNT), word & COUNT);
        match self {
            Want::Read if word & WRITER != 0 || (count != 0 && word & (WRITERS_WAIT | UPGRADER_WAITS) != 0) => None,
            Want::ReadAgain if word & WRITER != 0 => None,
            // More than the count can hold: as if taken.
            Want::Read | Want::ReadAgain | Want::Upgradable if count == COUNT => None,
            Want::Read | Want::ReadAgain => Some(word + 1),
            Want::Upgradable if word & (WRITER | UPGRADABLE) != 0 || (count != 0 && word & WRITERS_WAIT != 0) => None,
            Want::Upgradable => Some((word + 1) | UPGRADABLE),
            Want::Write if held != 0 => None,
            Want::Write => Some(word & WAITS | WRITER | me),
            Want::Upgrade if count != 1 => None,
            Want::Upgrade => Some(word & WAITS | WRITER | me),
        }
    }
}

impl WordRw {
    #[cfg(not(loom))]
    pub(crate) const fn new() -> Self {
        Self { word: AtomicU32::new(0), born: AtomicU32::new(0) }
    }

    /// As a child may find it.
    #[cfg(test)]
    pub(super) fn holding(word: u32, born: u32) -> Self {
        Self { word: AtomicU32::new(word), born: AtomicU32::new(born) }
    }

    #[cfg(loom)]
    pub(crate) fn new() -> Self {
        Self { word: AtomicU32::new(0), born: AtomicU32::new(0) }
    }

    #[inline(always)]
    fn once(&self, want: Want, me: &Slot, generation: u32) -> bool {
        let mut word = self.word.load(Relaxed);
        while let Some(next) = want.attempt(word, me.id()) {
            // Acquire pairs with the Release of every way of letting go.
            match self.word.compare_exchange_weak(word, next, Acquire, Relaxed) {
                Ok(_) => {
                    if word & COUNT == 0 && next & WRITER == 0 {
                        self.born.store(generation, Relaxed);
                    }
                    return true;
                }
                Err(now) => word = now,
            }
        }
        false
    }

    /// Takes the lock (not `Upgrade`).
    #[inline]
    pub(crate) fn lock<S: Seats>(&self, gate: &Gate<S>, me: &Slot, want: Want, generation: u32) -> bool {
        let outermost = gate.enter(me, LOCK);
        if !self.once(want, me, generation) {
            self.slow(gate, me, want, generation, None);
        }
        outermost
    }

    /// Takes the lock (not `Upgrade`) or gives up at `deadline`; then no region is left open.
    pub(crate) fn lock_until<S: Seats>(
        &self,
        gate: &Gate<S>,
        me: &Slot,
        want: Want,
        generation: u32,
        deadline: u64,
    ) -> bool {
        gate.enter_until(me, LOCK, Some(deadline))
            && (self.once(want, me, generation) || self.slow(gate, me, want, generation, Some(deadline)))
    }

    /// Takes the lock (not `Upgrade`) if it is to be had. Waits at the gate only.
    #[inline]
    pub(crate) fn try_lock<S: Seats>(&self, gate: &Gate<S>, me: &Slot, want: Want, generation: u32) -> bool {
        gate.enter(me, LOCK);
        if self.once(want, me, generation) {
            return true;
        }
        gate.leave(me, LOCK);
        false
    }

    /// The calling upgradable reader becomes the writer, or gives up at `deadline` and stays what it was.
    pub(crate) fn upgrade<S: Seats>(&self, gate: &Gate<S>, me: &Slot, generation: u32, deadline: Option<u64>) -> bool {
        self.try_upgrade(me) || self.slow(gate, me, Want::Upgrade, generation, deadline)
    }

    pub(crate) fn try_upgrade(&self, me: &Slot) -> bool {
        self.once(Want::Upgrade, me, 0)
    }

    #[inline]
    pub(crate) fn unlock_read<S: Seats>(&self, gate: &Gate<S>, me: &Slot) {
        let before = self.word.fetch_sub(1, if fault("read_relaxed") { Relaxed } else { Release });
        if before & WAITS != 0 {
            self.read_ended(before - 1);
        }
        gate.leave(me, LOCK);
    }

    #[inline]
    pub(crate) fn unlock_upgradable<S: Seats>(&self, gate: &Gate<S>, me: &Slot) {
        let before = self.word.fetch_sub(1 | UPGRADABLE, Release);
        if before & WAITS != 0 {
            self.wake(self.take_off(WAITS));
        }
        gate.leave(me, LOCK);
    }

    #[inline]
    pub(crate) fn unlock_write<S: Seats>(&self, gate: &Gate<S>, me: &Slot) {
        self.hand_back(0);
        gate.leave(me, LOCK);
    }

    /// The writer becomes a reader, upgradable or not.
    pub(crate) fn downgrade(&self, upgradable: bool, generation: u32) {
        self.born.store(generation, Relaxed);
        self.hand_back(if upgradable { 1 | UPGRADABLE } else { 1 });
    }

    /// The upgradable reader becomes a plain one.
    pub(crate) fn downgrade_upgradable(&self) {
        if self.word.fetch_and(!UPGRADABLE, Release) & WAITS != 0 {
            self.wake(self.take_off(WAITS));
        }
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.word.load(Relaxed) & (WRITER | COUNT) != 0
    }

    pub(crate) fn is_locked_exclusive(&self) -> bool {
        self.word.load(Relaxed) & WRITER != 0
    }

    /// From writer to `next`, without waiting bits.
    #[inline]
    fn hand_back(&self, next: u32) {
        let before = self.word.swap(next, if fault("write_relaxed") { Relaxed } else { Release });
        if before & WAITS != 0 {
            self.wake(before);
        }
    }

    /// Wakes if the lock is free now, or the upgradable reader alone.
    #[cold]
    fn read_ended(&self, word: u32) {
        let count = word & COUNT;
        if count == 0 {
            self.wake(self.take_off(WAITS));
        } else if count == 1 && word & UPGRADABLE != 0 {
            self.wake(self.take_off(UPGRADER_WAITS));
        }
    }

    /// Takes waiting bits off; those of them that were there. Who goes to sleep after this has set its bit again.
    fn take_off(&self, bits: u32) -> u32 {
        self.word.fetch_and(!bits, Relaxed) & bits
    }

    /// Wakes those whose bits were taken off.
    #[cold]
    fn wake(&self, bits: u32) {
        if bits & READERS_WAIT != 0 && !fault("readers_not_woken") {
            sync::futex_wake(&self.word, u32::MAX, READERS);
        }
        if bits & UPGRADER_WAITS != 0 && !fault("upgrader_not_woken") {
            sync::futex_wake(&self.word, 1, UPGRADER);
        }
        if bits & WRITERS_WAIT != 0 {
            sync::futex_wake(&self.word, 1, WRITERS);
        }
    }

    /// The end of waiting without the lock: those who stayed out because of this waiter look again, and so does a writer
    /// whose wake-up this one may have had.
    fn pass_on(&self, want: Want) {
        if fault("timed_out_lets_nobody_in") {
            return;
        }
        let writer = if want == Want::Write { WRITERS_WAIT } else { 0 };
        self.wake(self.take_off(WAITS) | writer);
    }

    /// Inside the region, the lock not to be had. True: inside, with the lock. False: outside and without it (an upgrader:
    /// inside, still a reader).
    #[cold]
    #[inline(never)]
    fn slow<S: Seats>(&self, gate: &Gate<S>, me: &Slot, want: Want, generation: u32, deadline: Option<u64>) -> bool {
        let (bit, keeps) = (want.bit(), want == Want::Upgrade);
        let (mut looks, mut slept) = (0, false);
        let mut suspicion: Option<u64> = None;
        loop {
            let mut now = want;
            if want == Want::Read && self.born.load(Relaxed) != generation {
                now = Want::ReadAgain;
            }
            if self.once(now, me, generation) {
                if slept && want == Want::Write && !fault("woken_writer_without_bit") {
                    // Others may sleep on, and nobody else was woken in their place.
                    self.word.fetch_or(WRITERS_WAIT, Relaxed);
                }
                return true;
            }
            let word = self.word.load(Relaxed);
            if now.attempt(word, me.id()).is_some() {
                continue;
            }
            if looks < LOOKS && word & WAITS == 0 {
                looks += 1;
                sync::spin_loop();
                continue;
            }
            if word & bit == 0 && self.word.compare_exchange(word, word | bit, Relaxed, Relaxed).is_err() {
                continue;
            }
            let word = word | bit;
            if deadline.is_none() && word & WRITER != 0 && word & COUNT == me.id() {
                gate.leave(me, LOCK);
                recursion();
            }
            let mut until = deadline;
            if gate.has_ghosts() && self.is_suspect(gate, word, generation, &mut suspicion, &mut until) {
                self.pass_on(want);
                if keeps {
                    // Unwinding ends the upgradable reader's hold too: lock_api has no guard for it any more.
                    self.unlock_upgradable(gate, me);
                } else {
                    gate.leave(me, LOCK);
                }
                ghost();
            }
            // An upgrader holds the lock: a region, while it waits as well.
            let outside = !keeps && me.only(LOCK);
            let before = me.sleeps(self.word_address(), Word::Rw);
            if outside {
                gate.leave(me, LOCK);
            } else if word & WRITER != 0 {
                gate.waits(me, word & COUNT);
            }
            let woke = sync::futex_wait(&self.word, word, want.sleeper(), until);
            me.woke(before);
            slept = true;
            let over = woke == Wake::TimedOut && deadline.is_some_and(|d| sync::now() >= d);
            if outside {
                if over || !gate.enter_until(me, LOCK, deadline) {
                    self.pass_on(want);
                    return false;
                }
            } else {
                gate.waits_no_more(me);
                if over {
                    self.pass_on(want);
                    if !keeps {
                        gate.leave(me, LOCK);
                    }
                    return false;
                }
            }
        }
    }

    /// Whether the lock is held by threads that are gone: a writer's seat tells; readers tell nothing, so they get some time.
    fn is_suspect<S: Seats>(
        &self,
        gate: &Gate<S>,
        word: u32,
        generation: u32,
        since: &mut Option<u64>,
        until: &mut Option<u64>,
    ) -> bool {
        if word & WRITER != 0 {
            return gate.is_ghost(word & COUNT);
        }
        if word & COUNT == 0 || self.born.load(Relaxed) == generation {
            return false;
        }
        let now = sync::now();
        let end = *since.get_or_insert(now) + PATIENCE;
        *until = Some(until.map_or(end, |u| u.min(end)));
        now >= end
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
