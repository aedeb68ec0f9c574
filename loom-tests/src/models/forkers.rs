//! Several forkers: the role, and whose turn it is (G5). No clock but in one.

use super::*;

/// One role, and both forks get it in the end.
#[test]
fn two_forkers_and_a_region() {
    check(2, || {
        let w = World::new(3);
        let a = w.thread(1, |w, me| assert_eq!(w.fork(me, &mut NoHooks, None), Ended::Forked));
        let b = w.thread(2, World::region);
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
        b.join().unwrap();
    });
}

/// Whoever has the role sees what the last one did, also where no gate was shut: registering relies on it.
#[test]
fn the_role_alone() {
    check(3, || {
        let w = World::new(2);
        let changes = |w: &World, me: &Slot| {
            if w.gate.try_role(me) {
                // SAFETY: loom checks it.
                w.role.with_mut(|r| unsafe { *r += 1 });
                w.gate.drop_role(me);
            }
        };
        let a = w.thread(1, changes);
        changes(&w, w.seat(0));
        a.join().unwrap();
    });
}

#[test]
fn three_forkers() {
    check(2, || {
        let w = World::new(3);
        let fork = |w: &World, me: &Slot| assert_eq!(w.fork(me, &mut NoHooks, None), Ended::Forked);
        let a = w.thread(1, fork);
        let b = w.thread(2, fork);
        fork(&w, w.seat(0));
        a.join().unwrap();
        b.join().unwrap();
    });
}

/// Two fork at once, one of them holds a lock: that one goes first, and neither fails.
#[test]
fn the_holder_forks_first() {
    check(2, || {
        let w = World::new(2);
        let a = w.thread(1, |w, me| {
            w.enter(me, LOCK);
            assert_eq!(w.fork(me, &mut NoHooks, None), Ended::Forked);
            w.leave(me, LOCK);
        });
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
    });
}

/// A third that holds nothing stands behind both.
#[test]
fn the_holder_forks_before_two() {
    check(1, || {
        let w = World::new(3);
        let fork = |w: &World, me: &Slot| assert_eq!(w.fork(me, &mut NoHooks, None), Ended::Forked);
        let a = w.thread(1, move |w, me| {
            w.enter(me, LOCK);
            fork(w, me);
            w.leave(me, LOCK);
        });
        let b = w.thread(2, fork);
        fork(&w, w.seat(0));
        a.join().unwrap();
        b.join().unwrap();
    });
}

/// Each holds a lock: one is told so at once, the other's fork goes ahead.
#[test]
fn both_hold() {
    check(2, || {
        let w = World::new(2);
        let fork = |w: &World, me: &Slot| {
            w.enter(me, LOCK);
            let ended = w.fork(me, &mut NoHooks, None);
            w.leave(me, LOCK);
            ended
        };
        let other = Arc::new(AtomicU32::new(0));
        let said = Arc::clone(&other);
        let a = w.thread(1, move |w, me| {
            let forked = fork(w, me) == Ended::Forked;
            said.store(u32::from(forked), Ordering::Relaxed);
        });
        let ended = fork(&w, w.seat(0));
        a.join().unwrap();
        assert!(matches!(ended, Ended::Forked | Ended::Not(Outcome::WouldDeadlock)), "{ended:?}");
        assert!(ended == Ended::Forked || other.load(Ordering::Relaxed) == 1, "both were refused");
    });
}

/// A thread in a region waits for a lock that the forker holds: seen, and said (G5). The clock is for a question that comes
/// between the other's last look and its sleep.
#[test]
fn the_forkers_lock_is_waited_for_in_a_region() {
    check(1, || {
        let w = World::reopening(2);
        w.gate.enter(w.seat(0), LOCK);
        let clock = Clock::start(FIRST_BOUND);
        let lock = Arc::new(AtomicU32::new(1));
        let waits = Arc::clone(&lock);
        let a = w.thread(1, move |w, me| {
            w.enter(me, GUARD);
            while waits.load(Ordering::Acquire) != 0 {
                let _before = me.sleeps(std::ptr::from_ref(&*waits).cast(), Word::Mutex);
                w.gate.waits(me, 1);
                sync::futex_wait(&waits, 1, sync::ANY, None);
            }
            w.gate.waits_no_more(me);
            w.leave(me, GUARD);
        });
        let ended = w.fork(w.seat(0), &mut NoHooks, None);
        assert!(matches!(ended, Ended::Forked | Ended::Not(Outcome::WouldDeadlock)), "{ended:?}");
        lock.store(0, Ordering::Release);
        sync::futex_wake(&lock, 1, sync::ANY);
        w.gate.leave(w.seat(0), LOCK);
        a.join().unwrap();
        clock.stop();
    });
}

/// The forker's question comes between the other's last look and its sleep: it is asked again long before the bound ends.
#[test]
fn asked_before_it_sleeps() {
    check(1, || {
        let w = World::reopening(2);
        w.gate.enter(w.seat(0), LOCK);
        let lock = Arc::new(AtomicU32::new(1));
        // As thread 1 does before it sleeps.
        w.gate.enter(w.seat(1), GUARD);
        let _before = w.seat(1).sleeps(std::ptr::from_ref(&*lock).cast(), Word::Mutex);
        w.gate.waits(w.seat(1), 1);
        let waits = Arc::clone(&lock);
        let a = w.thread(1, move |w, me| {
            loop {
                sync::futex_wait(&waits, 1, sync::ANY, None);
                w.gate.waits_no_more(me);
                if waits.load(Ordering::Acquire) == 0 {
                    break;
                }
                let _before = me.sleeps(std::ptr::from_ref(&*waits).cast(), Word::Mutex);
                w.gate.waits(me, 1);
            }
            w.gate.leave(me, GUARD);
        });
        let clock = Clock::within_the_bound();
        let ended = w.fork(w.seat(0), &mut NoHooks, None);
        assert_eq!(ended, Ended::Not(Outcome::WouldDeadlock));
        lock.store(0, Ordering::Release);
        sync::futex_wake(&lock, 1, sync::ANY);
        w.gate.leave(w.seat(0), LOCK);
        a.join().unwrap();
        clock.stop();
    });
}
