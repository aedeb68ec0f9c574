//! The words of the locks (L1 to L4): exclusion, wake-ups that are not lost, and waiting that keeps no fork waiting.
//!
//! Where no thread moves the clock, a lost wake-up is a deadlock, which loom reports.

use super::*;
use crate::locks::word_mutex::WordMutex;
use crate::locks::word_rw::{Want, WordRw};

const NOW: u32 = 0;

struct Locks {
    world: Arc<World>,
    mutex: WordMutex,
    rw: WordRw,
    data: UnsafeCell<u32>,
}

// SAFETY: not a promise but the question: loom checks each access to the cell.
unsafe impl Sync for Locks {}
// SAFETY: as above.
unsafe impl Send for Locks {}

impl Locks {
    fn new(threads: u32) -> Arc<Locks> {
        Self::of(World::new(threads))
    }

    fn of(world: Arc<World>) -> Arc<Locks> {
        Arc::new(Locks { world, mutex: WordMutex::new(), rw: WordRw::new(), data: UnsafeCell::new(0) })
    }

    fn thread(self: &Arc<Self>, i: usize, f: impl FnOnce(&Locks, &Slot) + 'static) -> JoinHandle<()> {
        let locks = Arc::clone(self);
        thread::spawn(move || {
            let me = locks.me(i);
            f(&locks, me);
            assert_eq!(me.depth(), 0, "thread {i} left a region open");
        })
    }

    fn me(&self, i: usize) -> &Slot {
        self.world.seat(i)
    }

    fn gate(&self) -> &Gate<Table> {
        &self.world.gate
    }

    /// What an exclusive section does. No fork's copy overlaps it either.
    fn write(&self, me: &Slot) {
        self.world.acts(me, 1);
        // SAFETY: loom checks it.
        self.data.with_mut(|d| unsafe { *d += 1 });
        self.world.acts(me, 0);
    }

    fn read(&self, me: &Slot) -> u32 {
        self.world.acts(me, 1);
        // SAFETY: loom checks it.
        let data = self.data.with(|d| unsafe { *d });
        self.world.acts(me, 0);
        data
    }

    fn locked(&self, me: &Slot) {
        self.mutex.lock(self.gate(), me);
        self.write(me);
        self.mutex.unlock(self.gate(), me);
    }

    fn writer(&self, me: &Slot) {
        self.rw.lock(self.gate(), me, Want::Write, NOW);
        self.write(me);
        self.rw.unlock_write(self.gate(), me);
    }

    fn timed_writer(&self, me: &Slot) {
        if self.rw.lock_until(self.gate(), me, Want::Write, NOW, 1) {
            self.write(me);
            self.rw.unlock_write(self.gate(), me);
        }
    }

    fn reader(&self, me: &Slot) {
        self.rw.lock(self.gate(), me, Want::Read, NOW);
        self.read(me);
        self.rw.unlock_read(self.gate(), me);
    }

    fn upgrader(&self, me: &Slot) {
        self.rw.lock(self.gate(), me, Want::Upgradable, NOW);
        let before = self.read(me);
        assert!(self.rw.upgrade(self.gate(), me, NOW, None));
        assert_eq!(self.read(me), before, "somebody wrote between reading and upgrading");
        self.write(me);
        self.rw.unlock_write(self.gate(), me);
    }

    /// Everything is free, and no bit that was left keeps anybody out.
    fn at_rest(&self) {
        for s in &self.gate().seats.seats {
            assert!(self.mutex.try_lock(self.gate(), s));
            self.mutex.unlock(self.gate(), s);
            for want in [Want::Read, Want::Upgradable, Want::Write] {
                assert!(self.rw.try_lock(self.gate(), s, want, NOW), "{want:?}");
                match want {
                    Want::Write => self.rw.unlock_write(self.gate(), s),
                    Want::Upgradable => self.rw.unlock_upgradable(self.gate(), s),
                    _ => self.rw.unlock_read(self.gate(), s),
                }
            }
            assert_eq!(s.depth(), 0);
        }
    }
}

fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    threads.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn three_lockers() {
    check(4, || {
        let l = Locks::new(3);
        let others = [l.thread(1, Locks::locked), l.thread(2, Locks::locked)];
        l.locked(l.me(0));
        join(others);
        assert_eq!(l.read(l.me(0)), 3);
        l.at_rest();
    });
}

/// A wake-up that meets a waiter whose time is up goes on to the next.
#[test]
fn a_timed_out_locker_passes_the_wake_up_on() {
    check(3, || {
        let l = Locks::new(3);
        l.mutex.lock(l.gate(), l.me(0));
        let timed = l.thread(1, |l, me| {
            if l.mutex.lock_until(l.gate(), me, 1) {
                l.write(me);
                l.mutex.unlock(l.gate(), me);
            }
        });
        let patient = l.thread(2, Locks::locked);
        let clock = thread::spawn(|| sync::advance(1));
        l.mutex.unlock(l.gate(), l.me(0));
        join([timed, patient, clock]);
        l.at_rest();
    });
}

/// Two who sleep on one lock: the bit says so to the first's own unlocking, though somebody took the lock in between.
#[test]
fn a_bit_for_the_second_sleeper() {
    check(2, || {
        let l = Locks::new(4);
        l.mutex.lock(l.gate(), l.me(0));
        let others = [l.thread(1, Locks::locked), l.thread(2, Locks::locked), l.thread(3, Locks::locked)];
        l.mutex.unlock(l.gate(), l.me(0));
        join(others);
        l.at_rest();
    });
}

/// The holder forks while another waits: who waits is in no region, and gets the lock afterwards.
#[test]
fn the_holder_forks() {
    check(3, || {
        let l = Locks::new(2);
        let me = l.me(0);
        l.mutex.lock(l.gate(), me);
        let waits = l.thread(1, Locks::locked);
        assert_eq!(l.world.fork(me, &mut NoHooks, None), Ended::Forked);
        l.write(me);
        l.mutex.unlock(l.gate(), me);
        join([waits]);
        l.at_rest();
    });
}

/// The same for a lock that readers and writers share.
#[test]
fn the_reader_forks() {
    check(1, || {
        let l = Locks::new(3);
        let me = l.me(0);
        l.rw.lock(l.gate(), me, Want::Read, NOW);
        let others = [l.thread(1, Locks::writer), l.thread(2, Locks::reader)];
        assert_eq!(l.world.fork(me, &mut NoHooks, None), Ended::Forked);
        l.rw.unlock_read(l.gate(), me);
        join(others);
        l.at_rest();
    });
}

/// Two lockers and a fork by a third thread that holds nothing.
#[test]
fn lockers_and_a_forker() {
    check(1, || {
        let l = Locks::new(3);
        let others = [l.thread(1, Locks::locked), l.thread(2, Locks::locked)];
        assert_eq!(l.world.fork(l.me(0), &mut NoHooks, None), Ended::Forked);
        join(others);
        l.at_rest();
    });
}

/// Who waits inside another region for what the forking thread holds is seen (G5), long before the budget ends.
#[test]
fn waiting_inside_a_region_for_the_forker() {
    check(1, || {
        let l = Locks::of(World::reopening(2));
        let me = l.me(0);
        l.mutex.lock(l.gate(), me);
        let nested = l.thread(1, |l, me| {
            l.gate().enter(me, GUARD);
            l.locked(me);
            l.gate().leave(me, GUARD);
        });
        // The forker's question may come just before the other falls asleep: then it asks again after a while.
        let clock = Clock::start(FIRST_BOUND);
        let ended = l.world.fork(me, &mut NoHooks, None);
        assert!(matches!(ended, Ended::Forked | Ended::Not(Outcome::WouldDeadlock)), "{ended:?}");
        l.mutex.unlock(l.gate(), me);
        join([nested]);
        clock.stop();
    });
}

/// A wait for a lock that the forking thread has just let go of is not taken for one, though it holds another.
#[test]
fn a_wait_that_has_just_ended() {
    check(3, || {
        let l = Locks::new(2);
        let me = l.me(0);
        l.mutex.lock(l.gate(), me);
        let nested = l.thread(1, |l, me| {
            l.gate().enter(me, GUARD);
            l.locked(me);
            l.gate().leave(me, GUARD);
        });
        l.mutex.unlock(l.gate(), me);
        l.gate().enter(me, LOCK);
        assert_eq!(l.world.fork(me, &mut NoHooks, None), Ended::Forked);
        l.gate().leave(me, LOCK);
        join([nested]);
    });
}

#[test]
fn a_writer_and_two_readers() {
    check(2, || {
        let l = Locks::new(3);
        let others = [l.thread(1, Locks::reader), l.thread(2, Locks::reader)];
        l.writer(l.me(0));
        join(others);
        l.at_rest();
    });
}

#[test]
fn three_writers_and_a_reader() {
    check(2, || {
        let l = Locks::new(4);
        let others = [l.thread(1, Locks::writer), l.thread(2, Locks::writer), l.thread(3, Locks::reader)];
        l.writer(l.me(0));
        join(others);
        assert_eq!(l.read(l.me(0)), 3);
        l.at_rest();
    });
}

/// One writer is woken for all; where its time is up it wakes the next, and the readers whom it kept out.
#[test]
fn a_timed_out_writer_passes_the_wake_up_on() {
    for want in [Want::Write, Want::Read] {
        check(2, move || {
            let l = Locks::new(4);
            let me = l.me(0);
            l.rw.lock(l.gate(), me, want, NOW);
            let others = [
                l.thread(1, Locks::timed_writer),
                l.thread(2, Locks::writer),
                l.thread(3, |l, me| {
                    sync::advance(1);
                    l.reader(me);
                }),
            ];
            match want {
                Want::Write => l.rw.unlock_write(l.gate(), me),
                _ => l.rw.unlock_read(l.gate(), me),
            }
            join(others);
            l.at_rest();
        });
    }
}

/// A reader kept out by a waiting writer alone gets in when that one gives up, though the first reader stays.
#[test]
fn a_timed_out_writer_lets_readers_in() {
    check(3, || {
        let l = Locks::new(3);
        let me = l.me(0);
        l.rw.lock(l.gate(), me, Want::Read, NOW);
        let writer = l.thread(1, |l, me| assert!(!l.rw.lock_until(l.gate(), me, Want::Write, NOW, 1)));
        let reader = l.thread(2, Locks::reader);
        sync::advance(1);
        join([writer, reader]);
        l.rw.unlock_read(l.gate(), me);
        l.at_rest();
    });
}

#[test]
fn upgraders_and_a_reader() {
    check(2, || {
        let l = Locks::new(3);
        let others = [l.thread(1, Locks::upgrader), l.thread(2, Locks::reader)];
        l.upgrader(l.me(0));
        join(others);
        assert_eq!(l.read(l.me(0)), 2);
        l.at_rest();
    });
}

#[test]
fn an_upgrader_and_a_writer() {
    check(2, || {
        let l = Locks::new(3);
        let others = [l.thread(1, Locks::writer), l.thread(2, Locks::reader)];
        l.upgrader(l.me(0));
        join(others);
        assert_eq!(l.read(l.me(0)), 2);
        l.at_rest();
    });
}

/// An upgrader whose time is up is an upgradable reader still, and lets those in whom it kept out.
#[test]
fn a_timed_out_upgrader() {
    check(3, || {
        let l = Locks::new(3);
        let me = l.me(0);
        l.rw.lock(l.gate(), me, Want::Read, NOW);
        let upgrader = l.thread(1, |l, me| {
            l.rw.lock(l.gate(), me, Want::Upgradable, NOW);
            assert!(!l.rw.upgrade(l.gate(), me, NOW, Some(1)));
            l.read(me);
            l.rw.unlock_upgradable(l.gate(), me);
        });
        let reader = l.thread(2, Locks::reader);
        sync::advance(1);
        join([upgrader, reader]);
        l.rw.unlock_read(l.gate(), me);
        l.at_rest();
    });
}

/// From writer to upgradable reader to reader: at each step those get in for whom there is room.
#[test]
fn downgrading() {
    check(2, || {
        let l = Locks::new(3);
        let me = l.me(0);
        l.rw.lock(l.gate(), me, Want::Write, NOW);
        l.write(me);
        let others = [
            l.thread(1, Locks::reader),
            l.thread(2, |l, me| {
                l.rw.lock(l.gate(), me, Want::Upgradable, NOW);
                l.read(me);
                l.rw.unlock_upgradable(l.gate(), me);
            }),
        ];
        l.rw.downgrade(true, NOW);
        l.read(me);
        l.rw.downgrade_upgradable();
        // The lock is still held for reading: all the others can come and go.
        join(others);
        l.rw.unlock_read(l.gate(), me);
        l.at_rest();
    });
}
