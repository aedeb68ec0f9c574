//! A hook's lock nested both ways round a region (H4).

use super::*;

/// A hook that takes a foreign lock, as hook.rs does.
pub(super) struct LockHook {
    pub(super) lock: Arc<Foreign>,
    held: bool,
}

impl LockHook {
    pub(super) fn new(lock: &Arc<Foreign>) -> Self {
        LockHook { lock: Arc::clone(lock), held: false }
    }
}

impl Steps for LockHook {
    fn block_signals(&mut self) {}
    fn restore_signals(&mut self) {}

    fn hooks(&mut self, how: How) -> Hooks {
        self.held = match how {
            How::Try => self.lock.try_lock(),
            How::Wait(until) => self.lock.lock(Some(until)),
        };
        if self.held { Hooks::Ready } else { Hooks::Conflict }
    }

    fn undo(&mut self) {
        assert!(std::mem::take(&mut self.held), "undone twice");
        self.lock.unlock();
    }
}

impl Step for LockHook {
    fn at_fork(&mut self) {
        assert!(self.held);
        // The lock is this thread's at the instant.
        // SAFETY: loom checks it.
        self.lock.held.with_mut(|h| unsafe { *h += 1 });
    }

    fn finish(&mut self) {
        self.undo();
    }

    fn is_undone(&self) -> bool {
        !self.held
    }
}

fn inside(w: &World, me: &Slot, lock: &Foreign) {
    w.enter(me, GUARD);
    lock.lock(None);
    lock.unlock();
    w.leave(me, GUARD);
}

fn outside(w: &World, me: &Slot, lock: &Foreign) {
    lock.lock(None);
    w.region(me);
    lock.unlock();
}

/// The lock inside a region: the gate first, and no time-out is needed.
#[test]
fn lock_inside_a_region() {
    check(3, || {
        let w = World::new(2);
        let lock = Arc::new(Foreign::new());
        let theirs = Arc::clone(&lock);
        let a = w.thread(1, move |w, me| inside(w, me, &theirs));
        assert_eq!(w.fork(w.seat(0), &mut LockHook::new(&lock), None), Ended::Forked);
        a.join().unwrap();
    });
}

/// A region inside the lock: the other way round, and no time-out is needed either.
#[test]
fn region_inside_a_lock() {
    check(3, || {
        let w = World::new(2);
        let lock = Arc::new(Foreign::new());
        let theirs = Arc::clone(&lock);
        let a = w.thread(1, move |w, me| outside(w, me, &theirs));
        assert_eq!(w.fork(w.seat(0), &mut LockHook::new(&lock), None), Ended::Forked);
        a.join().unwrap();
    });
}

/// Both at once: bounds tell, and all end.
#[test]
fn both_ways_round() {
    check(1, || {
        let w = World::reopening(3);
        let lock = Arc::new(Foreign::new());
        let (one, two) = (Arc::clone(&lock), Arc::clone(&lock));
        let a = w.thread(1, move |w, me| inside(w, me, &one));
        let b = w.thread(2, move |w, me| outside(w, me, &two));
        let clock = Clock::start(FIRST_BOUND);
        assert_eq!(w.fork(w.seat(0), &mut LockHook::new(&lock), None), Ended::Forked);
        a.join().unwrap();
        b.join().unwrap();
        clock.stop();
    });
}
