//! The seats of all threads: mapped in growing chunks, claimed without allocation, given back at the thread's end (G1, G7, G9).

#![allow(unsafe_code)]

use crate::chunks::{Chunks, FIRST, Zeroed};
use crate::gate::{GHOST, Seats, Slot, Used, VACANT};
use crate::verdict_page::Page;
use crate::{care_table, sys};
use std::sync::atomic::{AtomicU32, Ordering};

// SAFETY: atomics, null pointers and a new passage.
unsafe impl Zeroed for Slot {}

#[derive(Debug)]
#[repr(C)]
pub(crate) struct SlotTable {
    /// Seats ever given out.
    used: AtomicU32,
    pub(crate) verdicts: Page,
    seats: Chunks<Slot>,
}

impl SlotTable {
    pub(crate) const fn new() -> Self {
        Self {
            used: AtomicU32::new(0),
            verdicts: Page::new(),
            seats: Chunks::new([const { Slot::new() }; FIRST as usize]),
        }
    }

    /// A seat for thread `tid`, in use at once; `None` if there is no memory. Async-signal-safe.
    pub(crate) fn claim(&self, tid: u32) -> Option<&Slot> {
        loop {
            let used = self.used.load(Ordering::SeqCst);
            for i in 0..used {
                let Some(s) = self.seats.at(i) else { continue };
                if s.tid.load(Ordering::Relaxed) == VACANT
                    && s.tid.compare_exchange(VACANT, tid, Ordering::SeqCst, Ordering::Relaxed).is_ok()
                {
                    return Some(s);
                }
            }
            if used >= FIRST && used.is_power_of_two() && self.sweep() {
                continue;
            }
            if !self.seats.grow(used) {
                return None;
            }
            if let Some(s) = self.seats.at(used) {
                // Several threads may store it, the same value.
                s.id.store(used + 1, Ordering::Relaxed);
            }
            let _ = self.used.compare_exchange(used, used + 1, Ordering::SeqCst, Ordering::Relaxed);
        }
    }

    /// Seats whose threads ended without giving them back (the last round of their destructors took a new one).
    fn sweep(&self) -> bool {
        let mut found = false;
        self.each(|s| {
            let tid = s.tid.load(Ordering::Relaxed);
            if tid != VACANT && tid != GHOST && s.depth() == 0 && sys::thread_is_gone(tid) {
                found |= s.tid.compare_exchange(tid, VACANT, Ordering::SeqCst, Ordering::Relaxed).is_ok();
            }
            true
        });
        found
    }

    /// See `Seats::bury`.
    fn bury_the(&self, is_gone: impl Fn(u32) -> bool) -> bool {
        let mut holders = false;
        self.each(|s| {
            let tid = s.tid.load(Ordering::Relaxed);
            if tid != VACANT && tid != GHOST && s.depth() != 0 && is_gone(tid) {
                // Not if it gave the seat back meanwhile: another thread may have it by now.
                if s.tid.compare_exchange(tid, GHOST, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    return true;
                }
                let held = s.holds_lock();
                s.clear();
                if !held {
                    s.tid.store(VACANT, Ordering::Release);
                }
                holders |= held;
            }
            true
        });
        holders
    }

    /// In a child, where only the owner of `me` lives on: the others' seats are given back or, where their regions may
    /// have been cut off, become ghosts.
    #[unsafe(link_section = ".text_carefork")]
    pub(crate) fn keep_only(&self, me: Option<&Slot>, ghosts: bool) {
        self.each(|s| {
            if me.is_some_and(|m| std::ptr::eq(m, s)) {
                return true;
            }
            let tid = s.tid.load(Ordering::Relaxed);
            if tid == GHOST || tid == VACANT {
                return true;
            }
            if ghosts {
                // Its regions count for nobody, and are kept for the one that comes back (`mend`).
                s.bury();
            } else {
                s.clear();
                s.tid.store(VACANT, Ordering::Relaxed);
            }
            true
        });
    }
}

impl Seats for SlotTable {
    /// A thread that ended by SYS_exit ran no destructor. Its locks stay held for ever, and their owner's seat is a ghost's.
    fn bury(&self) -> bool {
        self.bury_the(sys::thread_is_gone)
    }

    fn loosen(&self, begins: bool) {
        if begins { care_table::loosen() } else { care_table::dirty_ends() }
    }

    fn verdict(&self, shut: u32) -> Option<&AtomicU32> {
        self.verdicts.word(shut)
    }

    fn used(&self, id: u32) -> Used {
        let Some(s) = self.seat(id) else { return Used::default() };
        let (kernel, user) = sys::processor_time(s.tid.load(Ordering::Relaxed));
        Used { kernel, user }
    }

    fn each(&self, mut f: impl FnMut(&Slot) -> bool) {
        for i in 0..self.used.load(Ordering::SeqCst) {
            if let Some(s) = self.seats.at(i)
                && !f(s)
            {
                return;
            }
        }
    }

    fn seat(&self, id: u32) -> Option<&Slot> {
        if id == 0 || id > self.used.load(Ordering::Relaxed) { None } else { self.seats.at(id - 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::{ANYBODY, ENDING, GUARD, Gate, HANDLER, LAST_BOUND, LOCK, WRITER, Word};

    #[test]
    fn who_ended_inside_a_region_is_buried() {
        for (kind, becomes) in [(GUARD, VACANT), (LOCK, GHOST)] {
            let gate = Gate::new(SlotTable::new());
            let seat = gate.seats.claim(1000).unwrap();
            gate.enter(seat, kind);
            assert!(!gate.seats.bury_the(|_| false));
            assert_eq!(seat.depth(), kind);
            assert_eq!(gate.seats.bury_the(|tid| tid == 1000), kind == LOCK);
            assert_eq!((seat.depth(), seat.tid.load(Ordering::Relaxed)), (0, becomes));
        }
    }

    /// At a shut gate a thread goes first for the region of one of a lower rank; not for the forker's own, nor one of its own rank: with them it
    /// would be kept out never, and the fork for ever.
    #[test]
    fn who_waits_for_an_awaited_thread() {
        let gate = Gate::new(SlotTable::new());
        let seats = [1000, 1001, 1002].map(|tid| gate.seats.claim(tid).unwrap());
        let [forker, mine, other] = seats;
        assert!(gate.try_role(forker));
        for (seat, theirs, ours) in [forker, other].into_iter().flat_map(|seat| {
            [ANYBODY, HANDLER, ENDING, WRITER]
                .into_iter()
                .flat_map(move |theirs| [ANYBODY, HANDLER, ENDING, WRITER].map(|ours| (seat, theirs, ours)))
        }) {
            seat.rank.store(theirs, Ordering::Relaxed);
            mine.rank.store(ours, Ordering::Relaxed);
            gate.enter(seat, LOCK);
            gate.enter(mine, GUARD);
            let shut = gate.shut(LAST_BOUND);
            assert_eq!(gate.goes_first(mine, shut), std::ptr::eq(seat, other) && theirs < ours);
            gate.reopen(shut);
            gate.leave(mine, GUARD);
            gate.leave(seat, LOCK);
        }
    }

    /// A signal handler's own wait for a lock comes amid that of its thread; what a thread slept on that was left behind is nobody's.
    #[test]
    fn waits_nest_and_are_left_behind() {
        let table = SlotTable::new();
        let [mine, other] = [1000, 1001].map(|tid| table.claim(tid).unwrap());
        let (a, b) = (std::sync::atomic::AtomicU32::new(!0), 0);
        for seat in [mine, other] {
            let none = seat.sleeps(a.as_ptr(), Word::Rw);
            assert!(none.is_null());
            let outer = seat.sleeps(&raw const b, Word::Mutex);
            assert_eq!(seat.waits_at(), ((&raw const b).cast_mut(), Word::Mutex));
            seat.woke(outer);
            assert_eq!(seat.waits_at(), (a.as_ptr(), Word::Rw));
        }
        table.keep_only(Some(mine), false);
        assert!(other.waits_at().0.is_null());
        mine.end_sleep();
        assert_eq!(a.into_inner(), !Word::Rw.sleepers());
    }

    /// A fork that waited for its turn when another went ahead dirty is no fork in that one's child.
    #[test]
    fn a_ghost_does_not_queue() {
        let gate: &Gate<SlotTable> = Box::leak(Box::new(Gate::new(SlotTable::new())));
        let (mine, other) = (gate.seats.claim(1000).unwrap(), gate.seats.claim(1001).unwrap());
        assert!(gate.try_role(mine));
        let waiting = std::thread::spawn(move || gate.take_role(other, None));
        while !other.is_forking() {
            std::thread::yield_now();
        }
        gate.seats.keep_only(Some(mine), true);
        assert!(other.is_ghost() && !other.is_forking());
        gate.drop_role(mine);
        assert!(waiting.join().unwrap());
    }

    /// It leaves its region, ends and gives its seat back while it is being looked at; another thread sits there by then.
    #[test]
    fn whoever_has_the_seat_of_one_that_is_gone_keeps_it() {
        let gate = Gate::new(SlotTable::new());
        let seat = gate.seats.claim(1000).unwrap();
        gate.enter(seat, GUARD);
        let found = gate.seats.bury_the(|tid| {
            gate.leave(seat, GUARD);
            seat.clear();
            seat.tid.store(VACANT, Ordering::Release);
            let next = gate.seats.claim(1001).unwrap();
            assert!(std::ptr::eq(next, seat));
            gate.enter(next, LOCK);
            tid == 1000
        });
        assert!(!found);
        assert_eq!((seat.depth(), seat.tid.load(Ordering::Relaxed)), (LOCK, 1001));
    }
}
