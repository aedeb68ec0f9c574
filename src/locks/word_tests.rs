//! What the words do with bits and owners that a fork left in them.

use super::word_mutex::{self, WordMutex};
use super::word_rw::{self, Want, WordRw};
use crate::gate::{GHOST, Gate, LOCK, Seats, Slot};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;

/// Seats 1 and 2: the thread that forked, and one that is gone or new.
struct Two([Slot; 2]);

impl Seats for Two {
    fn each(&self, f: impl FnMut(&Slot) -> bool) {
        self.0.iter().all(f);
    }

    fn seat(&self, id: u32) -> Option<&Slot> {
        self.0.get((id as usize).checked_sub(1)?)
    }
}

fn gate() -> Gate<Two> {
    let gate = Gate::new(Two([Slot::new(), Slot::new()]));
    for (s, id) in gate.seats.0.iter().zip(1..) {
        s.id.store(id, Relaxed);
        s.tid.store(id, Relaxed);
    }
    gate
}

/// As after a dirty fork: the second thread is a ghost.
fn haunted() -> Gate<Two> {
    let gate = gate();
    gate.seats.0[1].tid.store(GHOST, Relaxed);
    gate.set_ghosts();
    gate
}

fn dies_of_a_ghost(f: impl FnOnce()) {
    let why = catch_unwind(AssertUnwindSafe(f)).expect_err("it should have panicked");
    let why = why.downcast_ref::<&str>().expect("a fixed text");
    assert!(why.contains("left behind"), "{why}");
}

const OLD: u32 = 0;
const NEW: u32 = 1;
const KINDS: [Want; 3] = [Want::Read, Want::Upgradable, Want::Write];

fn unlock(l: &WordRw, gate: &Gate<Two>, me: &Slot, want: Want) {
    match want {
        Want::Write => l.unlock_write(gate, me),
        Want::Upgradable => l.unlock_upgradable(gate, me),
        _ => l.unlock_read(gate, me),
    }
    assert_eq!(me.depth(), 0);
}

#[test]
fn a_stale_bit_keeps_nobody_out_of_a_mutex() {
    let gate = gate();
    let me = &gate.seats.0[0];
    for way in 0..3 {
        let m = WordMutex::holding(word_mutex::WAIT);
        assert!(!m.is_locked());
        match way {
            0 => assert!(m.lock(&gate, me), "outermost"),
            1 => assert!(m.try_lock(&gate, me)),
            _ => assert!(m.lock_until(&gate, me, 0), "free, so taken past the deadline too"),
        }
        assert!(m.is_mine(me) && me.only(LOCK));
        m.unlock(&gate, me);
        assert!(!m.is_locked() && me.depth() == 0);
    }
}

#[test]
fn a_stale_bit_keeps_nobody_out_of_a_rwlock() {
    let gate = gate();
    let me = &gate.seats.0[0];
    for bits in (0..8).map(|b| b * word_rw::FIRST_WAIT) {
        for want in KINDS {
            let l = WordRw::holding(bits, OLD);
            assert!(!l.is_locked());
            assert!(l.try_lock(&gate, me, want, NEW));
            unlock(&l, &gate, me, want);
            let l = WordRw::holding(bits, OLD);
            assert!(l.lock(&gate, me, want, NEW));
            assert_eq!(l.is_locked_exclusive(), want == Want::Write);
            unlock(&l, &gate, me, want);
            assert!(l.lock_until(&gate, me, want, NEW, 0));
            unlock(&l, &gate, me, want);
            // From one kind to the other.
            assert!(l.lock(&gate, me, Want::Upgradable, NEW));
            assert!(l.upgrade(&gate, me, NEW, None));
            l.downgrade(true, NEW);
            l.downgrade_upgradable();
            unlock(&l, &gate, me, Want::Read);
            assert!(!l.is_locked());
        }
    }
}

/// The forking thread reads, and a writer waited in the parent: the child's readers need not wait for that one.
#[test]
fn a_writer_that_waited_in_the_parent_keeps_no_reader_out() {
    let gate = gate();
    let me = &gate.seats.0[0];
    let held = 7 * word_rw::FIRST_WAIT + 1;
    let l = WordRw::holding(held, OLD);
    assert!(l.lock(&gate, me, Want::Read, NEW), "without waiting");
    unlock(&l, &gate, me, Want::Read);
    // In the parent it does.
    let l = WordRw::holding(held, NEW);
    assert!(!l.try_lock(&gate, me, Want::Read, NEW));
    assert!(!l.lock_until(&gate, me, Want::Read, NEW, 0));
    assert_eq!(me.depth(), 0);
}

#[test]
fn a_ghosts_mutex() {
    let gate = haunted();
    let me = &gate.seats.0[0];
    for bit in [0, word_mutex::WAIT] {
        let m = WordMutex::holding(2 | bit);
        assert!(!m.try_lock(&gate, me));
        dies_of_a_ghost(|| {
            m.lock(&gate, me);
        });
        assert_eq!(me.depth(), 0, "a region is left open");
    }
}

#[test]
fn a_ghost_that_writes() {
    let gate = haunted();
    let me = &gate.seats.0[0];
    let l = WordRw::holding(word_rw::WRITER | 2, OLD);
    for want in KINDS {
        assert!(!l.try_lock(&gate, me, want, NEW));
        dies_of_a_ghost(|| {
            l.lock(&gate, me, want, NEW);
        });
        assert_eq!(me.depth(), 0, "a region is left open");
    }
}

/// Readers of before the fork may be the forking thread's own: a writer gives them a second, other readers come and go.
#[test]
fn a_ghost_that_reads() {
    let gate = haunted();
    let me = &gate.seats.0[0];
    let l = WordRw::holding(1, OLD);
    let begun = std::time::Instant::now();
    dies_of_a_ghost(|| {
        l.lock(&gate, me, Want::Write, NEW);
    });
    assert!(begun.elapsed().as_millis() >= 1_000);
    assert_eq!(me.depth(), 0);
    assert!(l.lock(&gate, me, Want::Read, NEW));
    unlock(&l, &gate, me, Want::Read);

    // An upgrader is no reader any more when it has panicked.
    assert!(l.lock(&gate, me, Want::Upgradable, NEW));
    dies_of_a_ghost(|| {
        l.upgrade(&gate, me, NEW, None);
    });
    assert_eq!(me.depth(), 0);
    assert!(l.try_lock(&gate, me, Want::Upgradable, NEW), "its place is free");
    unlock(&l, &gate, me, Want::Upgradable);
    assert!(!l.try_lock(&gate, me, Want::Write, NEW), "the ghost reads on");
}

#[test]
fn the_count_of_readers_does_not_overflow() {
    let gate = gate();
    let me = &gate.seats.0[0];
    let l = WordRw::holding(word_rw::COUNT - 1, OLD);
    assert!(l.try_lock(&gate, me, Want::Read, OLD));
    assert!(!l.try_lock(&gate, me, Want::Read, OLD));
    assert!(!l.try_lock(&gate, me, Want::Upgradable, OLD));
    assert!(!l.lock_until(&gate, me, Want::Read, NEW, 0));
    l.unlock_read(&gate, me);
    assert!(l.try_lock(&gate, me, Want::Upgradable, OLD));
    unlock(&l, &gate, me, Want::Upgradable);
}
