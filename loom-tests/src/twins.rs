//! What models need of the gate beyond its protocol: constructors that are not const, and the copy that a fork makes.
//!
//! A module of gate.rs, where the fields can be seen.

use super::*;
use crate::passage::Passage;
use crate::sync::{AtomicPtr, AtomicU8};

impl Slot {
    /// A taken seat.
    pub(crate) fn new(id: u32) -> Self {
        Self {
            depth: AtomicU64::new(0),
            tid: AtomicU32::new(id),
            id: AtomicU32::new(id),
            fork: AtomicU8::new(NONE),
            rank: AtomicU8::new(ANYBODY),
            ticket: AtomicU32::new(0),
            waits: AtomicU64::new(0),
            waits_at: AtomicPtr::new(std::ptr::null_mut()),
            entered: AtomicPtr::new(std::ptr::null_mut()),
            name: [AtomicU64::new(0), AtomicU64::new(0)],
            request: AtomicPtr::new(std::ptr::null_mut()),
            passage: Passage::new(),
        }
    }

    fn words(&self) -> [&AtomicU32; 3] {
        [&self.tid, &self.id, &self.ticket]
    }

    pub(crate) fn copied(&self) -> Self {
        let copy = Self::new(0);
        copy.depth.store(self.depth.load(Acquire), Relaxed);
        copy.fork.store(self.fork.load(Acquire), Relaxed);
        copy.waits.store(self.waits.load(Acquire), Relaxed);
        for (to, from) in copy.words().into_iter().zip(self.words()) {
            to.store(from.load(Acquire), Relaxed);
        }
        copy
    }
}

impl<S> Gate<S> {
    pub(crate) fn new(seats: S) -> Self {
        Self {
            word: AtomicU32::new(OPEN),
            mode: AtomicU32::new(OPEN),
            deadline: AtomicU64::new(0),
            committed: AtomicU32::new(0),
            watched: AtomicU64::new(UNWATCHED),
            waiters: AtomicU32::new(0),
            courteous: AtomicU32::new(0),
            drain: AtomicU32::new(0),
            sleeping: AtomicU32::new(0),
            drained: AtomicU32::new(0),
            asks: AtomicU32::new(0),
            role: AtomicU32::new(0),
            queued: AtomicU32::new(0),
            tickets: AtomicU32::new(0),
            turn: AtomicU32::new(0),
            reopened: AtomicU64::new(0),
            ghosts: AtomicU32::new(0),
            seats,
        }
    }

    fn words(&self) -> [&AtomicU32; 13] {
        [
            &self.mode,
            &self.committed,
            &self.waiters,
            &self.courteous,
            &self.drain,
            &self.sleeping,
            &self.drained,
            &self.asks,
            &self.role,
            &self.queued,
            &self.tickets,
            &self.turn,
            // Last, as if it were copied last: nothing may depend on it.
            &self.word,
        ]
    }

    /// The gate as a child finds it; `seats` were copied before.
    pub(crate) fn copied(&self, seats: S) -> Self {
        let copy = Self::new(seats);
        copy.deadline.store(self.deadline.load(Acquire), Relaxed);
        for (to, from) in copy.words().into_iter().zip(self.words()) {
            to.store(from.load(Acquire), Relaxed);
        }
        copy
    }
}
